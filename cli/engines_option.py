"""What --engines says, to what `load` takes."""


def engines_of(name: str | None) -> str | bool | None:
    """None and target names as they are; auto is the engines for this GPU, none is ONNX Runtime."""
    return {None: None, "auto": True, "none": False}.get(name, name)
