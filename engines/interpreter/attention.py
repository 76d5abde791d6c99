"""Attention, its rotary embedding and its cache as TensorRT has them: scores and softmax in float32."""

import numpy as np

from .arithmetic import rounded, softmax, wide
from .movement import Given, present
from .network import Layer


def attention(layer: Layer, inputs: Given) -> np.ndarray:
    """ATTENTION_INPUT, with all that comes before its ATTENTION_OUTPUT: softmax(q k^T, masked) v.

    q [batch, heads, s, d], k and v [batch, kv_heads, t, d]; query heads j*g .. j*g+g-1 share key head j. There is no
    scale: the parser multiplies q and k before. The mask, input 3, is bool (true: seen) or is added, and broadcasts
    to [batch, heads, s, t]; input 6 is the number of rows of each sequence. A token that sees nothing gives NaN.
    """
    q, k, v = (present(layer, inputs, i) for i in range(3))
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        raise layer.error(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}")
    batch, heads, tokens, _ = q.shape
    kv_heads, rows = k.shape[1:3]
    if heads % kv_heads or k.shape[:3] != v.shape[:3] or k.shape[0] != batch or k.shape[3] != q.shape[3]:
        raise layer.error(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit")
    grouped = wide(q).reshape(batch, kv_heads, heads // kv_heads * tokens, -1)
    scores = (grouped @ wide(k).swapaxes(2, 3)).reshape(batch, heads, tokens, rows)
    weights = softmax(masked(layer, inputs, scores)).reshape(batch, kv_heads, -1, rows)
    return rounded((weights @ wide(v)).reshape(batch, heads, tokens, -1), layer.outputs[0].dtype)


def masked(layer: Layer, inputs: Given, scores: np.ndarray) -> np.ndarray:
    """float32 scores [batch, heads, s, t], -inf where a token does not see a row.

    Inputs 3 and 6: the mask, and how many rows each sequence has, int32 [batch].
    """
    given = [*inputs, *[None] * (7 - len(inputs))]
    if len(given) > 7 or given[4] is not None or given[5] is not None:
        raise layer.error("it has inputs that the interpreter does not know")
    _, _, tokens, rows = scores.shape
    mask, lengths = given[3], given[6]
    within = None if lengths is None else (np.arange(rows) < lengths.reshape(-1, 1))[:, None, None]
    for seen in (mask, within, _causal(layer, tokens, rows)):
        if seen is not None:
            scores = np.where(seen, scores, np.float32(-np.inf)) if seen.dtype == bool else scores + wide(seen)
    return scores


def _causal(layer: Layer, tokens: int, rows: int) -> np.ndarray | None:
    kind = layer.attributes["causal"]
    if kind == "NONE":
        return None
    if kind not in ("UPPER_LEFT", "LOWER_RIGHT"):
        raise layer.error(f"causal mask {kind}")
    return np.tri(tokens, rows, rows - tokens if kind == "LOWER_RIGHT" else 0, dtype=bool)


def rotary_embedding(layer: Layer, inputs: Given) -> np.ndarray:
    """ROTARY_EMBEDDING of x [batch, heads, tokens, d], by cos and sin [batch, tokens, d / 2] (or rows of input 3)."""
    x, cos, sin = (present(layer, inputs, i) for i in range(3))
    if len({x.dtype, cos.dtype, sin.dtype}) > 1:
        raise layer.error(f"x, cos and sin are {x.dtype}, {cos.dtype} and {sin.dtype}")
    positions = inputs[3] if len(inputs) > 3 else None
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    width = layer.attributes["dim"] or x.shape[-1]
    if x.ndim != 4 or cos.shape != sin.shape or cos.shape != (x.shape[0], x.shape[2], width // 2):
        raise layer.error(f"x {x.shape}, cos {cos.shape} and sin {sin.shape} do not fit")
    cos, sin = wide(cos)[:, None], wide(sin)[:, None]
    whole = wide(x)
    turned, rest = whole[..., :width], whole[..., width:]
    interleaved = layer.attributes["interleaved"]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else np.split(turned, 2, axis=-1)
    parts = (first * cos - second * sin, second * cos + first * sin)
    result = np.stack(parts, -1).reshape(turned.shape) if interleaved else np.concatenate(parts, -1)
    return rounded(np.concatenate([result, rest], -1), layer.outputs[0].dtype)


def kv_cache_update(layer: Layer, inputs: Given) -> np.ndarray:
    """KV_CACHE_UPDATE: rows [batch, heads, s, d] go into the cache [batch, heads, length, d] from each start on.

    The cache given is written and returned, as in TensorRT, where input and output are one memory.
    """
    cache, rows, starts = (present(layer, inputs, i) for i in range(3))
    if cache.dtype != rows.dtype:
        raise layer.error(f"rows are {rows.dtype}, the cache is {cache.dtype}")
    if len(starts) != len(cache) or rows.shape[:2] != cache.shape[:2] or rows.shape[3] != cache.shape[3]:
        raise layer.error(f"rows {rows.shape} from {len(starts)} starts do not fit a cache {cache.shape}")
    count = rows.shape[2]
    for sequence, start in enumerate(starts.tolist()):
        if not 0 <= start <= cache.shape[2] - count:
            raise layer.error(f"rows {start} to {start + count - 1} leave a cache of {cache.shape[2]}")
        cache[sequence, :, start : start + count] = rows[sequence]
    return cache
