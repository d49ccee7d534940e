"""Forms of rows with images: where the images are, and where they stand in a conversation."""

import io
from pathlib import Path
from typing import Any

from kdlm.data.forms import Message
from kdlm.data.report import Unusable

IMAGE = "<image>"
"""Where a text says that an image stands, whatever the model's own token is."""


def references(value: Any, folder: str | None) -> list[dict[str, Any]]:
    """Return where the images of a row are: each as a path, or as the bytes of a file. Raises Unusable."""
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not values:
        raise Unusable("no image")
    found = []
    for one in values:
        if hasattr(one, "save"):  # what `datasets` decodes
            file = io.BytesIO()
            one.save(file, format="PNG")
            one = {"bytes": file.getvalue()}
        given = {"path": one} if isinstance(one, str) else {"bytes": one} if isinstance(one, bytes) else one
        if not isinstance(given, dict) or not (given.get("bytes") or given.get("path")):
            raise Unusable("malformed", f"an image is {type(one).__name__}: expected a path, bytes, or an image")
        if given.get("bytes"):
            found.append({"bytes": given["bytes"], "path": None})
            continue
        path = Path(folder or ".", str(given["path"])).expanduser()
        if not path.is_file():
            raise Unusable("no such image", str(path))
        found.append({"bytes": None, "path": str(path)})
    return found


def place_images(messages: list[Message], count: int) -> list[Message]:
    """Return messages whose content is a list of parts, as templates of vision-language models want it.

    Raises Unusable where they name another number of images than `count`.
    """
    placed = [{**message, "content": _parts(message["content"])} for message in messages]
    named = sum(part["type"] == "image" for message in placed for part in message["content"])
    if not named:
        first = next((message for message in placed if message["role"] == "user"), placed[0])
        first["content"] = [*({"type": "image"} for _ in range(count)), *first["content"]]
    elif named != count:
        raise Unusable("malformed", f"the text names {named} images, the row has {count}")
    return placed


def _parts(content: str | list[Any]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        if IMAGE not in content:
            return [{"type": "text", "text": content}]
        first, *others = (piece.strip() for piece in content.split(IMAGE))
        parts = _parts(first) if first else []
        for piece in others:
            parts += [{"type": "image"}, *(_parts(piece) if piece else [])]
        return parts
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind in ("image", "image_url"):
            parts.append({"type": "image"})
        else:
            raise Unusable("malformed", f"a part of a message is neither text nor image: {kind or type(part).__name__}")
    return parts
