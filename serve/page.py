"""The page at `/`: one file, which asks the server itself and nobody else."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from .service import Service

_PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def _hashed(element: str) -> str:
    """The hash of an inline element, by which a browser knows it."""
    found = re.search(rf"<{element}>(.*?)</{element}>", _PAGE, re.DOTALL)
    assert found is not None
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"


_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": f"default-src 'none'; script-src {_hashed('script')}; style-src {_hashed('style')}; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


async def page(service: Service, request: Request) -> Response:
    """A page to ask a model about a document."""
    return Response(_PAGE, media_type="text/html; charset=utf-8", headers=_HEADERS)
