"""Ask the safetensors library, the format's authority, whether it opens a file as we do.

Called by `output.finish` and `verification`. It maps the file and reads its header and one row, never the weights.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import quote


def refusal(path: Path, tensors: int) -> str:
    """Return why the safetensors library does not open a file with so many `tensors`; "" if it does."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            found = file.keys()
            if len(found) != tensors:
                return f"the safetensors library finds {len(found)} tensors in {quote(path.name)}, expected {tensors}"
            for name in found:
                part = file.get_slice(name)
                if part.get_dtype() == "U8" and part.get_shape():  # numpy holds neither BF16 nor FP8
                    part[0:1]
                    break
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        return f"the safetensors library refuses {quote(path.name)}: {quote(error)}"
    return ""
