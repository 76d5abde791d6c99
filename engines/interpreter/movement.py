"""Layers that move values and change none: slices, shuffles, gathers, scatters, concatenation, shapes, fills."""

from collections.abc import Sequence

import numpy as np

from .network import Layer, Shape

Given = Sequence[np.ndarray | None]


def present(layer: Layer, inputs: Given, index: int) -> np.ndarray:
    """An input that must be there."""
    array = inputs[index] if index < len(inputs) else None
    if array is None:
        raise layer.error(f"its input {index} is missing")
    return array


def _optional(inputs: Given, index: int) -> np.ndarray | None:
    return inputs[index] if index < len(inputs) else None


def _sizes(layer: Layer, inputs: Given, index: int, attribute: str) -> Shape | None:
    """Numbers that come as an input, or else as an attribute."""
    given = _optional(inputs, index)
    return layer.attributes[attribute] if given is None else tuple(int(n) for n in given.reshape(-1))


def shuffle(layer: Layer, inputs: Given) -> np.ndarray:
    """SHUFFLE: a transpose, a reshape and a transpose."""
    x = present(layer, inputs, 0)
    x = x.transpose(layer.attributes["first"][: x.ndim])
    sizes = _sizes(layer, inputs, 1, "reshape")
    if sizes is not None:
        if layer.attributes["zero_is_placeholder"]:
            if any(size == 0 and axis >= x.ndim for axis, size in enumerate(sizes)):
                raise layer.error(f"the zeros of shape {sizes} stand for dimensions that {x.shape} does not have")
            sizes = tuple(x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes))
        try:
            x = x.reshape(sizes)
        except ValueError:
            raise layer.error(f"a tensor of shape {x.shape} cannot take shape {sizes}") from None
    return x.transpose(layer.attributes["second"][: x.ndim])


def slice_(layer: Layer, inputs: Given) -> np.ndarray:
    """SLICE with strict bounds: start, start + stride ... of `shape` values, on the given axes or on all.

    A stride of zero repeats a value. Inputs 1, 2, 3 and 5 are start, shape, stride and axes where they are dynamic.
    """
    x = present(layer, inputs, 0)
    start, shape = _sizes(layer, inputs, 1, "start"), _sizes(layer, inputs, 2, "shape")
    stride = _sizes(layer, inputs, 3, "stride")
    axes = _sizes(layer, inputs, 5, "axes")
    axes = tuple(range(x.ndim)) if axes is None else axes
    if start is None or shape is None or stride is None or not len(start) == len(shape) == len(stride) == len(axes):
        raise layer.error(f"start {start}, shape {shape} and stride {stride} do not fit axes {axes}")
    places: list[slice] = [slice(None)] * x.ndim
    repeats = list(x.shape)
    for axis, first, count, step in zip(axes, start, shape, stride, strict=True):
        last, size = first + (count - 1) * step, x.shape[axis]
        if count < 0 or (count > 0 and not (0 <= first < size and 0 <= last < size)):
            raise layer.error(f"values {first} to {last} of axis {axis} leave its {size}")
        repeats[axis] = count
        if count == 0:
            places[axis] = slice(0, 0)
        elif step == 0:
            places[axis] = slice(first, first + 1)
        else:
            end = last + (1 if step > 0 else -1)
            places[axis] = slice(first, None if end < 0 else end, step)
    return np.broadcast_to(x[tuple(places)], repeats)


def concatenation(layer: Layer, inputs: Given) -> np.ndarray:
    """CONCATENATION along an axis."""
    parts = [part for part in inputs if part is not None]
    axis = layer.attributes["axis"]
    if len({(*part.shape[:axis], *part.shape[axis + 1 :]) for part in parts}) > 1:
        raise layer.error(f"shapes {[part.shape for part in parts]} differ beside axis {axis}")
    return np.concatenate(parts, axis)


def _checked(layer: Layer, indices: np.ndarray, size: int) -> np.ndarray:
    """Indices within a dimension: TensorRT's result is undefined for others."""
    if indices.size and not (indices.min() >= 0 and indices.max() < size):
        raise layer.error(f"indices from {indices.min()} to {indices.max()} leave a dimension of {size}")
    return indices


def gather(layer: Layer, inputs: Given) -> np.ndarray:
    """GATHER in its three modes; `batch` leading dimensions are shared."""
    x, indices = present(layer, inputs, 0), present(layer, inputs, 1)
    axis, mode, batch = (layer.attributes[key] for key in ("axis", "mode", "batch"))
    if mode == "ELEMENT":
        return np.take_along_axis(x, _checked(layer, indices, x.shape[axis]), axis)
    if mode == "ND":
        return x[_nd_places(layer, x, indices, batch)]
    if batch == 0:
        return np.take(x, _checked(layer, indices, x.shape[axis]), axis)
    _checked(layer, indices, x.shape[axis])
    leading = x.shape[:batch]
    result = [np.take(x[place], indices[place], axis - batch) for place in np.ndindex(*leading)]
    return np.stack(result).reshape(*leading, *result[0].shape)


def _nd_places(layer: Layer, x: np.ndarray, indices: np.ndarray, batch: int) -> tuple[np.ndarray, ...]:
    """What GatherND and ScatterND index `x` with: after `batch` shared dimensions, tuples in the last axis."""
    depth = indices.shape[-1]
    shared = np.ix_(*(np.arange(size) for size in x.shape[:batch])) if batch else ()
    lines = indices.ndim - 1 - batch
    leading = tuple(place.reshape(*place.shape, *[1] * lines) for place in shared)
    parts = tuple(_checked(layer, indices[..., i], x.shape[batch + i]) for i in range(depth))
    return (*leading, *parts)


def scatter(layer: Layer, inputs: Given) -> np.ndarray:
    """SCATTER: a copy of the data with the updates written. Of values for one place the last stays."""
    x, indices, updates = (present(layer, inputs, i) for i in range(3))
    result = x.copy()
    if layer.attributes["mode"] == "ND":
        result[_nd_places(layer, x, indices, 0)] = updates
    elif layer.attributes["mode"] == "ELEMENT":
        axis = layer.attributes["axis"]
        np.put_along_axis(result, _checked(layer, indices, x.shape[axis]), updates, axis)
    else:
        raise layer.error(f"scatter mode {layer.attributes['mode']}")
    return result


def shape(layer: Layer, inputs: Given) -> np.ndarray:
    """SHAPE: int64 [rank]."""
    return np.array(present(layer, inputs, 0).shape, np.int64)


def squeeze(layer: Layer, inputs: Given) -> np.ndarray:
    """SQUEEZE of the axes in input 1."""
    x, axes = present(layer, inputs, 0), present(layer, inputs, 1)
    chosen = tuple(int(axis) for axis in axes.reshape(-1))
    if any(x.shape[axis] != 1 for axis in chosen):
        raise layer.error(f"axes {chosen} of shape {x.shape} are not all of size 1")
    return x.squeeze(chosen)


def unsqueeze(layer: Layer, inputs: Given) -> np.ndarray:
    """UNSQUEEZE: new axes where input 1 says, counted in the result."""
    x, axes = present(layer, inputs, 0), present(layer, inputs, 1)
    return np.expand_dims(x, tuple(int(axis) for axis in axes.reshape(-1)))


def fill(layer: Layer, inputs: Given) -> np.ndarray:
    """FILL, linearly spaced: alpha + index * beta. Inputs 0, 1, 2 are shape, alpha and beta where dynamic."""
    dtype = layer.outputs[0].dtype
    sizes = _sizes(layer, inputs, 0, "shape")
    alpha, beta = _optional(inputs, 1), _optional(inputs, 2)
    if sizes is None or any(size < 0 for size in sizes):
        raise layer.error(f"a fill of shape {sizes}")
    start = np.asarray(layer.attributes["alpha"] if alpha is None else alpha).reshape(()).astype(dtype)
    steps = np.asarray(layer.attributes["beta"] if beta is None else beta).reshape(-1).astype(dtype)
    if len(steps) not in (1, len(sizes)) or (len(sizes) > 1 and len(steps) == 1):
        raise layer.error(f"{len(steps)} steps for {len(sizes)} dimensions")
    result = np.full(sizes, start, dtype)
    for axis, step in enumerate(steps):
        line = np.arange(sizes[axis]).astype(dtype) * step
        result += line.reshape([-1 if i == axis else 1 for i in range(len(sizes))])
    return result
