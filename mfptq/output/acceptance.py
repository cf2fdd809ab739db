"""Ask the safetensors library, the format's authority, whether it opens a file as we do.

Called by `finish` and `structure`. It maps the file and reads its header and one row, never the weights.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import counted, quote


def refusal(path: Path, tensors: int) -> str:
    """Return, to follow the file's name, why the safetensors library does not open it with so many `tensors`, or ""."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            found = file.keys()
            if len(found) != tensors:
                return f"is not as it should be: the safetensors library finds {counted(len(found), 'tensor', 'tensors')} in it, expected {tensors}"
            for name in found:
                part = file.get_slice(name)
                if part.get_dtype() == "U8" and part.get_shape():  # numpy holds neither BF16 nor FP8
                    part[0:1]
                    break
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        return f"cannot be loaded: the safetensors library refuses it: {quote(error)}"
    return ""
