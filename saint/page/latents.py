"""The browser's page of all latents, served beside the demo's own: cards lead there and back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from saint.steering.guide import Guide

PAGE = "latents.html"
_HEAD_BYTES = 4096  # of the page, which says there whose latents it shows


def find_pages(sae_paths: Sequence[Path], guides: Sequence[Guide]) -> list[Path | None]:
    """Return the `latents.html` beside each SAE, None where there is none or it is another's."""
    found: list[Path | None] = []
    for sae_path, guide in zip(sae_paths, guides, strict=True):
        path = sae_path.with_name(PAGE)
        meta = {} if guide.evidence is None else guide.evidence.meta
        mark = f'data-sae="{meta.get("sae_fingerprint")}"'
        found.append(path if path.is_file() and mark.encode() in _head(path) else None)
    return found


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def with_pages(guides: Sequence[Guide], pages: Sequence[Path | None]) -> list[Guide]:
    """Let guides say where their latents' pages are, relative to the demo's."""
    found = list(guides)
    for sae, page in enumerate(pages):
        if page is not None:
            found[sae] = replace(found[sae], page=f"latents-{sae}?sae={sae}")
    return found


def routes(pages: Sequence[Path | None]) -> list[Route]:
    """Return what serves them. Without a suffix: Gradio would compress megabytes of base64."""
    return [Route(f"/latents-{i}", _sender(page)) for i, page in enumerate(pages) if page]


def _sender(path: Path) -> Callable[[Request], Awaitable[Response]]:
    async def send(_: Request) -> Response:
        headers = {"X-Content-Type-Options": "nosniff"}
        return FileResponse(path, media_type="text/html", headers=headers)

    return send
