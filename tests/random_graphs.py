"""Random graphs: a list of numbers picks ops, sources, shapes, layouts and names one after the other, in a host's ggml API and in NumPy at once.

Every value of a graph is a tensor and a NumPy array with the same axes, so that a graph needs no other description than its numbers. NumPy computes in
float64. An op is a row in OPS: a function that picks sources that fit and adds values, or none. Numbers mean other graphs when OPS changes: what a
graph has found belongs into a test of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from graphs import BF16, F16, F32, I32, I64, Case, Ggml

LARGEST = 20  # beyond it a value is not read by further ops: a sine or an exponential would make much of the last bits of a large one
WEIGHT_NAMES = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "")
WIDTHS = (32, 64, 96, 128, 192, 256)
TOKENS = (1, 2, 3, 5, 8, 13, 40)


@dataclass(eq=False)
class Value:
    tensor: Any
    array: np.ndarray  # axes as NumPy has them, slowest first: four of them
    text: str
    exact: bool = False  # the same bits in every implementation: what sorts or steps may read
    type_: int = F32
    sources: tuple[Value, ...] = ()
    nb: tuple[int, ...] = ()  # bytes between elements, as ggml has them; contiguous unless given

    def __post_init__(self) -> None:
        self.nb = self.nb or strides(self.ne, self.type_)

    @property
    def is_view(self) -> bool:
        return self.text.startswith(("reshape", "permute", "view"))

    @property
    def ne(self) -> tuple[int, int, int, int]:
        a, b, c, d = self.array.shape
        return d, c, b, a

    @property
    def contiguous(self) -> bool:
        """Bytes between elements are what the shape says, also along axes of one element: some of a host's ops ask for that."""
        return self.nb == strides(self.ne, self.type_)

    @property
    def whole_rows(self) -> bool:
        return self.nb[0] == BYTES[self.type_]

    @property
    def even_rows(self) -> bool:
        """Whole rows, each as far from the one before: part of each row of a matrix is still that."""
        return self.whole_rows and self.nb[2] == self.nb[1] * self.ne[1] and self.nb[3] == self.nb[2] * self.ne[2]


BYTES = {F32: 4, F16: 2, BF16: 2}


def strides(ne: Sequence[int], type_: int) -> tuple[int, ...]:
    nb = BYTES.get(type_, 0)
    return (nb, nb * ne[0], nb * ne[0] * ne[1], nb * ne[0] * ne[1] * ne[2])


class RandomGraph:
    def __init__(self, ggml: Ggml, numbers: Sequence[int], weight_types: Sequence[int]) -> None:
        self.g = Case(ggml, seed=sum(numbers) + 31 * len(numbers))
        self.lib, self.c = ggml.lib, self.g.c
        self.numbers, self.at = numbers, 0
        self.weight_types = weight_types
        self.values: list[Value] = []  # nodes and views of the graph, in its order
        self.pool: list[Value] = []  # what further ops may read: these, and leaves
        width, tokens = self.pick(WIDTHS), self.pick(TOKENS)
        self.leaf(width, tokens)
        self.result("scale_bias", self.pool[0].array * 2, self.pool[0], more=(2.0, 0.0))  # one at least that has memory of its own
        if self.pick((0, 1)):
            self.leaf(32, self.pick((1, 2, 3, 4, 6)), tokens)

    # ---- choices

    def pick(self, options: Sequence[Any]) -> Any:
        if self.at >= len(self.numbers):
            return options[0]
        self.at += 1
        return options[self.numbers[self.at - 1] % len(options)]

    def any(self, fits: Callable[[Value], bool] = lambda v: True) -> Value | None:
        """The newest that fits are the likeliest: graphs are deep rather than wide."""
        fitting = [v for v in reversed(self.pool) if fits(v)]
        if not fitting:
            return None
        return fitting[min(self.pick((0, 0, 0, 1, 1, 2, 3, 5, 8)), len(fitting) - 1)]

    def grow(self) -> None:
        names = sorted(OPS)
        while self.at < len(self.numbers):
            OPS[self.pick(names)](self)

    # ---- values

    def leaf(self, *ne: int, name: str = "", type_: int = F32, scale: float = 1.0, values: np.ndarray | None = None, pooled: bool = True) -> Value:
        shape = (*ne, 1, 1, 1, 1)[:4][::-1]
        array = (self.g.rng.normal(0, scale, shape) if values is None else values.reshape(shape)).astype(np.float32)
        if type_ == F16:
            array = array.astype(np.float16)
        if type_ == BF16:
            array = (array.view(np.uint32) & 0xFFFF0000).view(np.float32)
        array = array.astype(np.float64)
        value = Value(self.g.leaf(type_, *ne, name=name, values=array), array, f"leaf {list(ne)} {name}", True, type_)
        if pooled:
            self.pool.append(value)
        return value

    def weight(self, k: int, n: int, *more: int) -> Value:
        type_, name = self.pick(self.types_for(k)), self.pick(WEIGHT_NAMES)
        return self.weight_of(type_, f"blk.{self.pick((0, 1, 7))}.{name}{'_exps' if more else ''}.weight" if name else "", k, n, *more)

    def types_for(self, k: int) -> list[int]:
        """Of whose blocks a row of k is whole ones."""
        return [t for t in self.weight_types if k % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(t)][0] == 0] or [F32]

    def weight_of(self, type_: int, name: str, k: int, n: int, *more: int) -> Value:
        """Its array is what its blocks hold."""
        if type_ == F32:
            return self.leaf(k, n, *more, name=name, scale=k**-0.5, pooled=False)
        ne = (k, n, *more, 1, 1)[:4]
        tensor = self.g.leaf(type_, *ne, name=name, scale=k**-0.5)
        blocks = np.frombuffer(self.g.leaves[-1][1], np.uint8).reshape(*ne[:0:-1], -1)
        array = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(type_)).reshape(ne[::-1]).astype(np.float64)
        return Value(tensor, array, f"leaf {list(ne)} {name}", False, type_)

    def indices(self, values: np.ndarray, type_: int = I32) -> Any:
        return self.g.leaf(type_, *values.shape[::-1], values=values)

    def add(self, tensor: Any, array: np.ndarray, text: str, *sources: Value, exact: bool = False, type_: int = F32, nb: tuple[int, ...] = ()) -> Value:
        exact = exact and all(s.exact for s in sources)
        numbered = ", ".join(f"%{self.values.index(s)}" if s in self.values else s.text for s in sources)
        value = Value(tensor, array, f"{text}({numbered}) {[*array.shape[::-1]]}", exact, type_, sources, nb)
        self.values.append(value)
        if np.isfinite(array).all() and np.abs(array).max(initial=0) < LARGEST:
            self.pool.append(value)
        return value

    def result(self, name: str, array: np.ndarray, *sources: Value, more: tuple = (), exact: bool = False) -> Value:
        """A node of op `name` that makes a new, contiguous tensor."""
        tensor = getattr(self.lib, f"ggml_{name}")(self.c, *(s.tensor for s in sources), *more)
        return self.add(tensor, np.ascontiguousarray(array), f"{name}{list(more) or ''}", *sources, exact=exact)

    def cont(self, v: Value) -> Value:
        return v if v.contiguous else self.copied(v)

    def copied(self, v: Value) -> Value:
        return self.add(self.lib.ggml_cont(self.c, v.tensor), np.ascontiguousarray(v.array), "cont", v, exact=True, type_=v.type_)

    def with_rows(self, v: Value) -> Value:
        return v if v.whole_rows else self.cont(v)

    def with_even_rows(self, v: Value) -> Value:
        return v if v.even_rows else self.cont(v)

    def floats(self) -> Value | None:
        return self.any(lambda v: v.type_ == F32)


Op = Callable[[RandomGraph], None]
OPS: dict[str, Op] = {}


def op(f: Op) -> Op:
    OPS[f.__name__] = f
    return f


def _erf(x: np.ndarray) -> np.ndarray:
    from math import erf

    return np.vectorize(erf, otypes=[np.float64])(x)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(0.79788456080286535587989211986876 * x * (1 + 0.044715 * x * x)))


# name: what it computes, whether it steps (then it reads what is exact only)
UNARY: dict[str, tuple[Callable[[np.ndarray], np.ndarray], bool]] = {
    "silu": (lambda x: x * _sigmoid(x), False), "relu": (lambda x: np.maximum(x, 0), False), "sigmoid": (_sigmoid, False), "tanh": (np.tanh, False),
    "neg": (np.negative, False), "abs": (np.abs, False), "gelu_erf": (lambda x: 0.5 * x * (1 + _erf(x / 2**0.5)), False), "sqr": (np.square, False),
    "sin": (np.sin, False), "cos": (np.cos, False), "softplus": (lambda x: np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20)))), False),
    "hardsigmoid": (lambda x: np.clip((x + 3) / 6, 0, 1), False), "elu": (lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))), False),
    "sgn": (np.sign, True), "step": (lambda x: (x > 0).astype(np.float64), True), "floor": (np.floor, True),
}  # fmt: skip
# ggml_glu's number: what becomes of the gate
GLU: dict[int, Callable[[np.ndarray], np.ndarray]] = {0: lambda x: np.maximum(x, 0), 1: _gelu, 2: lambda x: x * _sigmoid(x)}


@op
def unary(r: RandomGraph) -> None:
    name = r.pick(sorted(UNARY))
    f, steps = UNARY[name]
    if v := r.any(lambda v: v.type_ == F32 and (v.exact or not steps)):
        v = r.with_even_rows(v)
        r.result(name, f(v.array), v)


@op
def scale(r: RandomGraph) -> None:
    if v := r.floats():
        s, b = r.pick((0.5, -1.25, 2.0)), r.pick((0.0, 0.75))
        v = r.cont(v)  # as the host's CPU wants it
        r.result("scale_bias", v.array * s + b, v, more=(s, b))


@op
def clamp(r: RandomGraph) -> None:
    if v := r.floats():
        v = r.cont(v)
        r.result("clamp", np.clip(v.array, -0.75, 1.5), v, more=(-0.75, 1.5))


def _other(r: RandomGraph, a: Value) -> Value:
    """Something that is repeated over a: another value, a vector for its rows, one number for each row, or for each of a matrix's rows."""

    def repeats(v: Value) -> bool:
        return v.type_ == F32 and all(n % m == 0 for n, m in zip(a.ne, v.ne, strict=True))

    kind = r.pick(("value", "value", "value", "vector", "column", "leaf"))
    if kind == "value" and (found := r.any(repeats)):
        return found
    return r.leaf(*{"vector": (a.ne[0],), "column": (1, a.ne[1], a.ne[2])}.get(kind, a.ne), name=r.pick(("", "blk.0.attn_norm.weight", "blk.0.ffn_down.bias")))


def _repeated(b: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.tile(b, [n // m for n, m in zip(shape, b.shape, strict=True)])


def _binary(name: str, f: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    def build(r: RandomGraph) -> None:
        if a := r.floats():
            a = r.with_rows(a)
            b = r.with_rows(_other(r, a))
            r.result(name, f(a.array, _repeated(b.array, a.array.shape)), a, b)

    build.__name__ = name
    op(build)


_binary("add", np.add)
_binary("sub", np.subtract)
_binary("mul", np.multiply)


@op
def norm(r: RandomGraph) -> None:
    name = r.pick(("rms_norm", "rms_norm", "norm", "l2_norm"))
    if v := r.floats():
        v = r.with_rows(v)
        x, eps = v.array, 1e-2  # not less: what all but cancels would be amplified, and with it what differs
        if name == "norm":
            x = x - x.mean(-1, keepdims=True)
        square = (x * x).mean(-1, keepdims=True)
        y = x / np.maximum(np.sqrt(square * x.shape[-1]), eps) if name == "l2_norm" else x / np.sqrt(square + eps)
        out = r.result(name, y, v, more=(eps,))
        if r.pick((0, 1)):  # as hosts do, who weight it in place
            w = r.leaf(v.ne[0], name="blk.0.ffn_norm.weight", pooled=False)
            r.result("mul", out.array * w.array, out, w)


@op
def soft_max(r: RandomGraph) -> None:
    if v := r.floats():
        v = r.cont(v)
        x, sources = v.array * 0.5, [v]
        mask = r.g.null
        if r.pick((0, 1)):
            m = r.leaf(v.ne[0], v.ne[1], type_=r.pick((F32, F16)), pooled=False)
            x, mask, sources = x + m.array, m.tensor, [v, m]
        e = np.exp(x - x.max(-1, keepdims=True))
        r.add(r.lib.ggml_soft_max_ext(r.c, v.tensor, mask, 0.5, 0.0), e / e.sum(-1, keepdims=True), "soft_max", *sources)


@op
def glu(r: RandomGraph) -> None:
    number = r.pick(sorted(GLU))
    if r.pick((0, 1)):
        if v := r.any(lambda v: v.type_ == F32 and v.ne[0] % 2 == 0):
            v, swapped = r.with_even_rows(v), r.pick((False, True))
            halves = np.split(v.array, 2, -1)
            r.result("glu", GLU[number](halves[swapped]) * halves[not swapped], v, more=(number, swapped))
    elif (a := r.floats()) and (b := r.any(lambda v: v.type_ == F32 and v.ne == a.ne)):
        a, b = r.with_even_rows(a), r.with_even_rows(b)
        r.add(r.lib.ggml_glu_split(r.c, a.tensor, b.tensor, number), GLU[number](a.array) * b.array, f"glu_split[{number}]", a, b)


# ---- products


def _product(r: RandomGraph, w: Value, x: Value) -> Value:
    a, b = w.array, x.array
    a = a.repeat(b.shape[1] // a.shape[1], 1).repeat(b.shape[0] // a.shape[0], 0)
    return r.result("mul_mat", b @ a.swapaxes(-1, -2), w, x)


@op
def product(r: RandomGraph) -> None:
    if x := r.any(lambda v: v.type_ == F32 and v.ne[0] >= 32):
        x = r.with_rows(x)
        y = _product(r, r.weight(x.ne[0], r.pick(WIDTHS)), x)
        if r.pick((0, 0, 1)):
            bias = r.leaf(y.ne[0], name="blk.0.attn_output.bias", pooled=False)
            r.result("add", y.array + bias.array, y, bias)


@op
def products(r: RandomGraph) -> None:
    """Gate, up, GLU, down: and each of them a value for others."""
    if x := r.any(lambda v: v.type_ == F32 and v.ne[0] >= 32):
        x, n = r.with_rows(x), r.pick(WIDTHS)
        gate, up = (_product(r, r.weight(x.ne[0], n), x) for _ in range(2))
        hidden = r.add(r.lib.ggml_glu_split(r.c, gate.tensor, up.tensor, 2), GLU[2](gate.array) * up.array, "glu_split", gate, up)
        down = _product(r, r.weight(n, x.ne[0]), hidden)
        if r.pick((0, 1)):
            r.result("add", down.array + x.array, down, x)


@op
def product_of_values(r: RandomGraph) -> None:
    b = r.floats()
    a = b and r.any(lambda v: v.ne[0] == b.ne[0] and b.ne[2] % v.ne[2] == 0 and b.ne[3] % v.ne[3] == 0)
    if a and b:
        a, b = r.with_rows(a) if a.type_ == F32 else a, r.with_rows(b)
        if a.whole_rows:
            _product(r, a, b)


@op
def experts(r: RandomGraph) -> None:
    """Each token's own two of five experts, by numbers that the host gives."""
    if x := r.any(lambda v: v.type_ == F32 and v.ne[0] >= 32 and v.ne[2] == v.ne[3] == 1):
        x, n = r.cont(x), r.pick(WIDTHS)
        tokens = x.ne[1]
        chosen = np.stack([r.g.rng.permutation(5)[:2] for _ in range(tokens)])
        ids = r.indices(chosen)
        w = r.weight(x.ne[0], n, 5)
        each = r.add(r.lib.ggml_reshape_3d(r.c, x.tensor, x.ne[0], 1, tokens), x.array.reshape(1, tokens, 1, x.ne[0]), "reshape", x, exact=True)
        y = np.einsum("tk,tenk->ten", x.array[0, 0], w.array[0][chosen])[None]
        y = r.add(r.lib.ggml_mul_mat_id(r.c, w.tensor, each.tensor, ids), y, "mul_mat_id", w, each)
        if r.pick((0, 1)):
            bias = r.leaf(n, 5, name="blk.0.ffn_up_exps.bias", pooled=False)
            r.add(r.lib.ggml_add_id(r.c, y.tensor, bias.tensor, ids), y.array + bias.array[0, 0][chosen][None], "add_id", y, bias)


# ---- attention


@op
def attention(r: RandomGraph) -> None:
    """Q, K and V of one input, rotated, K and V through a cache, with and without flash attention, and what all heads give together."""
    x = r.any(lambda v: v.type_ == F32 and v.ne[0] >= 32 and v.ne[2] == v.ne[3] == 1)
    if not x:
        return
    x = r.with_rows(x)
    kv_heads, group, d, layer = r.pick((1, 2, 3, 4, 8)), r.pick((1, 2, 4)), r.pick((32, 64)), r.pick((0, 1, 7))
    tokens, k, cells = x.ne[1], x.ne[0], x.ne[1] + 3
    type_ = r.pick(r.types_for(k))

    def heads(which: str, n: int, out: int) -> Value:
        w = r.weight_of(type_, f"blk.{layer}.attn_{which}.weight", k, n * out)
        y = _product(r, w, x)
        return r.add(r.lib.ggml_reshape_3d(r.c, y.tensor, out, n, tokens), y.array.reshape(1, tokens, n, out), "reshape", y)

    q, key, value = heads("q", kv_heads * group, d), heads("k", kv_heads, d), heads("v", kv_heads, d)
    if r.pick((0, 1)):
        q, key = rotated(r, q, 0), rotated(r, key, 0)
    rows = np.sort(r.g.rng.permutation(cells)[:tokens])
    keys, values = (stored(r, v, cells, rows, f"cache_{kind}_l{layer}") for kind, v in (("k", key), ("v", value)))
    mask = np.where(r.g.rng.uniform(size=(1, 1, tokens, cells)) < 0.7, 0.0, -np.inf)
    mask[..., rows[0]] = 0
    unwritten = np.setdiff1d(np.arange(cells), rows)
    mask[..., unwritten] = -np.inf
    m = r.leaf(cells, tokens, type_=F16, values=mask, pooled=False)
    scores = np.einsum("bthd,bchd->bhtc", q.array, keys.array.repeat(group, 2)) * d**-0.5 + mask
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    out = np.einsum("bhtc,bchd->bthd", shares, values.array.repeat(group, 2))
    asked, keys_of_heads, values_of_heads = (permuted(r, v, (0, 2, 1, 3)) for v in (q, keys, values))
    if r.pick((0, 1)):
        tensor = r.lib.ggml_flash_attn_ext(r.c, asked.tensor, keys_of_heads.tensor, values_of_heads.tensor, m.tensor, d**-0.5, 0.0, 0.0)
        y = r.add(tensor, np.ascontiguousarray(out), "flash_attn_ext", asked, keys_of_heads, values_of_heads, m)
    else:
        products = _product(r, keys_of_heads, asked)
        weights = r.add(r.lib.ggml_soft_max_ext(r.c, products.tensor, m.tensor, d**-0.5, 0.0), shares, "soft_max", products, m)
        y = r.cont(permuted(r, _product(r, r.cont(permuted(r, values_of_heads, (1, 0, 2, 3))), weights), (0, 2, 1, 3)))
    r.add(r.lib.ggml_reshape_3d(r.c, y.tensor, y.ne[0] * y.ne[1], tokens, 1), y.array.reshape(1, 1, tokens, -1), "reshape", y)


def stored(r: RandomGraph, v: Value, cells: int, rows: np.ndarray, name: str) -> Value:
    """v [d, n, tokens] in rows of a cache, which is [d, n, cells] afterwards."""
    d, n, tokens, _ = v.ne
    type_ = r.pick((F16, F16, F32, BF16))
    before = np.zeros((1, 1, cells, d * n))
    cache = r.leaf(d * n, cells, type_=type_, name=name, values=before, pooled=False)
    v = r.cont(v)
    flat = r.add(r.lib.ggml_reshape_3d(r.c, v.tensor, d * n, tokens, 1), v.array.reshape(1, 1, tokens, d * n), "reshape", v)
    after = before.copy()
    after[0, 0, rows] = rounded(flat.array[0, 0], type_)
    tensor = r.lib.ggml_set_rows(r.c, cache.tensor, flat.tensor, r.indices(rows, I64))
    out = r.add(tensor, after, "set_rows", cache, flat, type_=type_)
    return r.add(r.lib.ggml_reshape_3d(r.c, out.tensor, d, n, cells), after.reshape(1, cells, n, d), "reshape", out, type_=type_)


def rounded(values: np.ndarray, type_: int) -> np.ndarray:
    if type_ == F16:
        return values.astype(np.float32).astype(np.float16).astype(np.float64)
    if type_ == BF16:
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)
    return values


def rotated(r: RandomGraph, v: Value, mode: int) -> Value:
    """RoPE of pairs side by side (mode 0) or half a head apart (2), of v [d, n, tokens]."""
    d, _, tokens, _ = v.ne
    v, positions = r.with_rows(v), r.g.rng.integers(0, 40, tokens)
    angle = positions[:, None] * 10000.0 ** (-np.arange(0, d, 2) / d)
    cos, sin = (f(angle)[None, :, None, :] for f in (np.cos, np.sin))
    x = v.array
    a, b = (x[..., 0::2], x[..., 1::2]) if mode == 0 else (x[..., : d // 2], x[..., d // 2 :])
    y = np.empty_like(x, order="C")
    low, high = a * cos - b * sin, a * sin + b * cos
    if mode == 0:
        y[..., 0::2], y[..., 1::2] = low, high
    else:
        y[..., : d // 2], y[..., d // 2 :] = low, high
    tensor = r.lib.ggml_rope_ext(r.c, v.tensor, r.indices(positions), r.g.null, d, mode, 0, 10000.0, 1.0, 0.0, 1.0, 32.0, 1.0)
    return r.add(tensor, y, f"rope[{mode}]", v)


@op
def rope(r: RandomGraph) -> None:
    if v := r.any(lambda v: v.type_ == F32 and v.ne[0] % 2 == 0 and v.ne[3] == 1 and v.ne[2] <= 64):
        rotated(r, v, r.pick((0, 2)))


# ---- layouts


def permuted(r: RandomGraph, v: Value, axes: tuple[int, int, int, int]) -> Value:
    """ggml_permute: axis i becomes axis axes[i]."""
    order = [axes.index(d) for d in range(4)]  # of ggml: where the new axis d was
    array = v.array.transpose([3 - order[3 - a] for a in range(4)])
    return r.add(r.lib.ggml_permute(r.c, v.tensor, *axes), array, f"permute{list(axes)}", v, exact=True, type_=v.type_, nb=tuple(v.nb[d] for d in order))


@op
def permute(r: RandomGraph) -> None:
    if v := r.floats():
        permuted(r, v, r.pick(((0, 2, 1, 3), (1, 0, 2, 3), (2, 0, 1, 3), (0, 1, 3, 2), (1, 2, 0, 3))))


@op
def contiguous(r: RandomGraph) -> None:
    if v := r.any(lambda v: v.type_ == F32 and not v.contiguous):
        r.cont(v)


@op
def reshape(r: RandomGraph) -> None:
    if v := r.any(lambda v: v.type_ == F32 and v.contiguous):
        a, b, c, d = v.ne
        shapes = [(a * b, c, d), (a, b * c, d), (a, b, c * d)]
        shapes += [(a // n, n * b, c * d) for n in (2, 3, 4) if a % n == 0] + [(a // n, n, b * c * d) for n in (2, 4) if a % n == 0]
        ne = r.pick(shapes)
        r.add(r.lib.ggml_reshape_3d(r.c, v.tensor, *ne), v.array.reshape(1, *ne[::-1]), f"reshape{list(ne)}", v, exact=True)


@op
def slice_of(r: RandomGraph) -> None:
    """A part of one axis: of Q, K and V in a row, a head, some tokens."""
    if v := r.any(lambda v: max(v.ne) > 1 and v.whole_rows):  # elements of the host's views lie side by side
        axis = r.pick([d for d in range(4) if v.ne[d] > 1])
        n = v.ne[axis]
        size = r.pick(sorted({max(n // 2, 1), max(n // 4, 1), max(n // 3, 1), n - 1}))
        begin = r.pick((0, n - size, (n - size) // 2, (n - size + 1) // 3))
        index = [slice(None)] * 4
        index[3 - axis] = slice(begin, begin + size)
        array = v.array[tuple(index)]
        tensor = r.lib.ggml_view_4d(r.c, v.tensor, *array.shape[::-1], *v.nb[1:], begin * v.nb[axis])
        r.add(tensor, array, f"view[axis {axis}, {begin} to {begin + size}]", v, exact=True, type_=v.type_, nb=v.nb)


@op
def concat(r: RandomGraph) -> None:
    if a := r.floats():
        axis = r.pick((0, 0, 1, 2))
        b = r.any(lambda v: v.type_ == F32 and all(n == m for d, (n, m) in enumerate(zip(a.ne, v.ne, strict=True)) if d != axis))
        a, b = r.cont(a), r.cont(b or a)
        r.result("concat", np.concatenate([a.array, b.array], 3 - axis), a, b, more=(axis,), exact=True)


@op
def repeat(r: RandomGraph) -> None:
    if v := r.any(lambda v: v.type_ == F32 and v.array.size < 20000):
        v, times = r.cont(v), r.pick(((1, 2, 1, 1), (2, 1, 1, 1), (1, 1, 3, 1), (1, 1, 1, 2)))
        ne = tuple(n * t for n, t in zip(v.ne, times, strict=True))
        r.add(r.lib.ggml_repeat_4d(r.c, v.tensor, *ne), np.tile(v.array, times[::-1]), f"repeat{list(times)}", v, exact=True)


@op
def pad(r: RandomGraph) -> None:
    if v := r.any(lambda v: v.type_ == F32 and v.array.size < 20000):
        v, more = r.cont(v), r.pick(((1, 0, 0, 0), (0, 2, 0, 0), (3, 1, 1, 0)))
        r.result("pad", np.pad(v.array, [(0, n) for n in more[::-1]]), v, more=more, exact=True)


@op
def roll(r: RandomGraph) -> None:
    if v := r.floats():
        shifts = [by for by in ((1, 0, 0, 0), (0, 1, 0, 0), (-2, 1, 0, 0)) if all(abs(b) < n for b, n in zip(by, v.ne, strict=True))]
        v, by = r.cont(v), r.pick(shifts or [(0, 0, 0, 0)])
        r.result("roll", np.roll(v.array, by[::-1], (0, 1, 2, 3)), v, more=by, exact=True)


# ---- rows


@op
def get_rows(r: RandomGraph) -> None:
    if v := r.any(lambda v: v.type_ == F32 and v.ne[3] == 1):
        v = r.with_rows(v)
        rows = r.g.rng.integers(0, v.ne[1], (v.ne[2], r.pick((1, 2, 7))))
        ids = r.indices(rows)
        y = np.stack([v.array[0, i][rows[i]] for i in range(v.ne[2])])[None]
        r.add(r.lib.ggml_get_rows(r.c, v.tensor, ids), y, "get_rows", v, exact=True)


@op
def cache(r: RandomGraph) -> None:
    if v := r.any(lambda v: v.type_ == F32 and v.ne[3] == 1 and v.ne[2] <= 64):
        cells = v.ne[2] + 2
        rows = r.g.rng.permutation(cells)[: v.ne[2]]
        out = stored(r, v, cells, rows, r.pick(("cache_k_l0", "cache_v_l0", "state", "")))
        r.add(r.lib.ggml_cast(r.c, out.tensor, F32), out.array, "cast", out)


@op
def copy(r: RandomGraph) -> None:
    """Into a part of something that is stored."""
    if v := r.any(lambda v: v.type_ == F32 and v.ne[2] == v.ne[3] == 1):
        n, m, _, _ = v.ne
        type_ = r.pick((F32, F16))
        target = r.leaf(n, m + 2, type_=type_, name=r.pick(("cache_v_l1", "")), values=np.zeros((m + 2, n)), pooled=False)
        size = 4 if type_ == F32 else 2
        part = r.lib.ggml_view_4d(r.c, target.tensor, n, m, 1, 1, n * size, n * m * size, n * m * size, n * size)
        r.add(r.lib.ggml_cpy(r.c, v.tensor, part), np.ascontiguousarray(rounded(v.array, type_)), "cpy", v, type_=type_)


@op
def cast(r: RandomGraph) -> None:
    if v := r.any():
        to = r.pick((F32, F16))
        v = v if v.type_ != F32 else r.cont(v)
        r.add(r.lib.ggml_cast(r.c, v.tensor, to), np.ascontiguousarray(rounded(v.array, to)), f"cast[{to}]", v, type_=to)


# ---- sums and orders


@op
def sums(r: RandomGraph) -> None:
    name = r.pick(("sum_rows", "mean", "cumsum"))
    if v := r.floats():
        v = r.cont(v)
        x = v.array
        r.result(name, {"sum_rows": x.sum(-1, keepdims=True), "mean": x.mean(-1, keepdims=True), "cumsum": x.cumsum(-1)}[name], v)


@op
def order(r: RandomGraph) -> None:
    """Rows of a leaf in an order that is computed."""
    if v := r.any(lambda v: v.type_ == F32 and v.exact and 1 < v.ne[0] <= 64 and v.ne[2] == v.ne[3] == 1):
        v = r.cont(v)
        if len(np.unique(v.array)) < v.array.size:
            return  # equals come in any order
        ranked = np.argsort(v.array, -1)
        tensor = r.lib.ggml_argsort(r.c, v.tensor, 0)
        table = r.leaf(32, v.ne[0], pooled=False)
        first = r.lib.ggml_view_4d(r.c, tensor, v.ne[0], 1, 1, 1, v.ne[0] * 4, v.ne[0] * 4, v.ne[0] * 4, 0)
        r.add(r.lib.ggml_get_rows(r.c, table.tensor, first), table.array[:, :, ranked[0, 0, 0]], "get_rows of argsort", v, exact=True)


@op
def masked(r: RandomGraph) -> None:
    if v := r.any(lambda v: v.type_ == F32 and v.ne[0] == v.ne[1]):
        v, kind = r.cont(v), r.pick((0, 1, 2, 3))
        lower, diagonal = kind >= 2, kind in (0, 2)
        keep = np.tril(np.ones(v.ne[:2]), 0 if diagonal else -1) if lower else np.triu(np.ones(v.ne[:2]), 0 if diagonal else 1)
        r.result("tri", v.array * keep, v, more=(kind,), exact=True)


def evaluate(graph: RandomGraph, reused: bool, floor: float = 1e-4) -> tuple[list[str], dict[str, float]]:
    """Runs the graph on its device: what is wrong with it in words, and how far each of its values is from NumPy's (mean squares, of
    values that are less than `floor` in the mean as if they were that: what cancels in a sum is not its sources' error).

    Nodes lie in a compute buffer, as a host's do. `reused`: later ones take the memory of what is read no more, and what nobody reads is compared; else
    each is an output with its own memory, all are compared, and a second run must give the same bits.
    """
    ggml, lib = graph.g.ggml, graph.lib
    read = {id(s) for v in graph.values for s in v.sources}
    for v in list(graph.values):
        # Nobody reads it: a view is compared as a tensor of its own; a cast is its own second source, and its memory, if nobody else reads it, free at once.
        if id(v) not in read and (v.is_view or v.text.startswith("cast")):
            read.add(id(v))
            graph.copied(v)
    compared = [v for v in graph.values if v.contiguous and not v.is_view and (not reused or id(v) not in read)]
    wrong = [f"not claimed: %{i} = {v.text}" for i, v in enumerate(graph.values) if not lib.ggml_backend_dev_supports_op(ggml.device, v.tensor)]
    nodes = lib.ggml_new_graph(graph.c)
    for v in graph.values:
        if not reused:
            lib.ggml_set_output(v.tensor)
        lib.ggml_build_forward_expand(nodes, v.tensor)
    leaves = graph.g.store()
    allocator = lib.ggml_gallocr_new(lib.ggml_backend_get_default_buffer_type(ggml.backend))
    assert lib.ggml_gallocr_alloc_graph(allocator, nodes)
    errors: dict[str, float] = {}
    results: list[list[bytes]] = []
    for _ in range(1 if reused or wrong else 2):
        if (status := 0 if wrong else lib.ggml_backend_graph_compute(ggml.backend, nodes)) != 0:
            wrong.append(f"status {status}")
        results.append([] if wrong else [_bytes_of(graph, v) for v in compared])
    if results[0] != results[-1]:
        wrong.append("a second run gives other bits")
    for v, raw in zip(compared, results[0], strict=False):
        got, expected = _floats(raw, v.type_), v.array.ravel()
        error = float(np.mean((got - expected) ** 2) / (np.mean(expected**2) + floor)) if np.isfinite(expected).all() else 0.0
        errors[f"%{graph.values.index(v)} = {v.text}"] = error if np.isfinite(error) else np.inf
    lib.ggml_gallocr_free(allocator)
    lib.ggml_backend_buffer_free(leaves)
    lib.ggml_free(graph.c)
    lib.ggml_free(graph.g.stored)
    return wrong, errors


def _bytes_of(graph: RandomGraph, v: Value) -> bytes:
    raw = bytearray(graph.lib.ggml_nbytes(v.tensor))
    graph.lib.ggml_backend_tensor_get(v.tensor, graph.g.ggml.ffi.from_buffer(raw), 0, len(raw))
    return bytes(raw)


def _floats(raw: bytes, type_: int) -> np.ndarray:
    if type_ == BF16:
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(raw, np.float16 if type_ == F16 else np.float32).astype(np.float64)
