"""The page's files, read once: few, small, and only these names are served."""

import hashlib
from importlib.resources import files

from fastapi import Request, Response
from starlette.exceptions import HTTPException

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def page_file(request: Request, name: str) -> Response:
    """A file of the page, or 304 when the client has it; HTTPException 404 for any other name."""
    assets: dict[str, tuple[bytes, str, str]] = request.app.state.assets
    if name not in assets:
        raise HTTPException(404, "There is no such file.")
    data, media_type, tag = assets[name]
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=media_type, headers=headers)


def read_page() -> dict[str, tuple[bytes, str, str]]:
    """Bytes, media type and ETag by name."""
    assets = {}
    for file in files("rag_serving").joinpath("page").iterdir():
        suffix = file.name[file.name.rfind(".") :]
        if suffix in _TYPES:
            data = file.read_bytes()
            assets[file.name] = (data, _TYPES[suffix], f'"{hashlib.sha256(data).hexdigest()[:32]}"')
    return assets
