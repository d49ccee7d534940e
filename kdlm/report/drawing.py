"""Vega: its JavaScript for the page, and figures as PNG without a browser."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kdlm.disk import write_bytes
from kdlm.report.look import config
from kdlm.report.panel import Spec

MISSING = "vl-convert-python is not installed: pip install 'kdlm[report]'"
START = 'window.vegaEmbed=vegaEmbed;document.dispatchEvent(new Event("vega"));'
WIDTH = 520
"""Pixels of a PNG's figure, before its scale, where the page would give it the room there is."""


def installed() -> bool:
    return find_spec("vl_convert") is not None


def converter() -> Any:
    """Return the library. Raises ImportError with what to install where it is missing."""
    if not installed():
        raise ImportError(MISSING)
    import vl_convert

    return vl_convert


def bundle() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, which says `vega` to the document when it is there."""
    return converter().javascript_bundle(START).replace("</script", "<\\/script").replace("<!--", "<\\!--")


def png(spec: Spec, *, dark: bool = False, scale: float = 2) -> bytes:
    """Return a figure as PNG."""
    sized = spec | {"width": WIDTH} if spec.get("width") == "container" else spec
    return converter().vegalite_to_png(json.dumps(sized), config=config(dark), scale=scale)


def write_pngs(specs: Mapping[str, Spec], folder: Path) -> list[Path]:
    """Write each figure as a PNG into the folder, named after it, and return the files."""
    written = []
    for name, spec in specs.items():
        path = folder / f"{name.replace('/', '-')}.png"
        write_bytes(path, png(spec))
        written.append(path)
    return written
