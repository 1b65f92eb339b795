"""A web page that steers a Llama with the latents of one or more SAEs.

    python llama_3_inference_text_completion_gradio.py --llama_model_dir M \
        --sae_model_path ./trained_sae.pt --port 8080

Say what to turn up, and compare what the model writes plainly and steered. The page is
served to this machine only; `--share` or another `--host` asks every visitor for a password.
"""

from __future__ import annotations

import argparse
import io
import os
import secrets
import socket
import threading
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from llama_3 import CheckpointError
from saint.stage.errors import UserError, log
from saint.stage.flags import positive_int
from saint.stage.program import log_arguments, run_stage
from saint.steering.concepts import ConceptFinder, add_concept_flags, open_finder
from saint.steering.guide import Guide
from saint.steering.settings import Limits
from saint.steering.showcase import SHOWCASE, Shown, load_showcase
from saint.steering.studio import Studio, add_studio_flags, load_studio

if TYPE_CHECKING:
    import gradio

    from saint.page.handlers import PageHandlers

_LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_studio_flags(parser)
    add_concept_flags(parser)
    page = parser.add_argument_group("page")
    page.add_argument("--port", type=positive_int, default=8080, help="TCP port [8080]")
    page.add_argument(
        "--host", default="127.0.0.1", help="address to listen on [127.0.0.1: this machine only]"
    )
    page.add_argument(
        "--share", action="store_true", help="also open a public link through Gradio's servers"
    )
    page.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        help="ask visitors for these; without it --share and --host make up a one-time password",
    )
    limits = parser.add_argument_group("what one request may ask for")
    limits.add_argument(
        "--max_new_tokens", type=positive_int, default=Limits.new_tokens,
        help=f"tokens per completion [{Limits.new_tokens}]",
    )  # fmt: skip
    limits.add_argument(
        "--max_prompts", type=positive_int, default=Limits.prompts,
        help=f"prompts at a time [{Limits.prompts}]",
    )  # fmt: skip
    limits.add_argument(
        "--max_total_tokens", type=positive_int, default=Limits.tokens,
        help="prompts times (tokens of the longest + new tokens): what the caches' memory grows "
        f"with [{Limits.tokens}]",
    )  # fmt: skip
    return parser


def choose_auth(auth: str | None, *, host: str, share: bool) -> tuple[str, str] | None:
    """Return (user, password) that visitors must give, or None where only this machine can come.

    Without `--auth`, a page that others can reach gets a password that is made up here.
    Raises UserError for an `--auth` that is not user:password.
    """
    if auth is not None:
        user, colon, password = auth.partition(":")
        if not (user and colon and password):
            raise UserError("--auth: expected user:password, neither of them empty")
        return user, password
    if not share and host in _LOCAL_HOSTS:
        return None
    return "saint", secrets.token_urlsafe(12)


def require_port(host: str, port: int) -> None:
    """Raise UserError when a port cannot be listened on."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"port {port} of {host} cannot be used ({reason}): --port names another"
        ) from None


def launch(
    studio: Studio,
    guides: list[Guide],
    *,
    finder: ConceptFinder | None = None,
    shown_concepts: Sequence[Shown] = (),
    latent_pages: Sequence[Path | None] = (),
    host: str,
    port: int | None,
    share: bool,
    auth: tuple[str, str] | None,
) -> tuple[gradio.Blocks, PageHandlers]:
    """Start serving in the background; port None takes a free one.

    latent_pages: each SAE's page of its latents, see `find_pages`.

    Raises OSError when the port is taken, UserError when there is no public link to share.
    """
    # Before gradio is imported: nothing is reported to anybody.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from starlette.middleware import Middleware

    from saint.page.gate import Gate
    from saint.page.handlers import PageHandlers
    from saint.page.latents import routes, with_pages
    from saint.page.layout import build_page, css, theme

    known = with_pages(guides, latent_pages)
    handlers = PageHandlers(studio, known, finder, shown_concepts)
    page = build_page(handlers)
    with redirect_stdout(io.StringIO()):  # what Gradio says there, we say in our own words
        page.launch(
            server_name=host,
            server_port=port,
            share=share,
            # Gradio's own login leaves routes open, and its login page names the API.
            app_kwargs={
                "middleware": [Middleware(Gate, *auth)] if auth else [],
                "routes": routes(latent_pages),
            },
            theme=theme(),
            css=css(),
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
            # Each visitor's, and each API client's, takes 0.1 MB.
            state_session_capacity=200,
            footer_links=["api"],
            # Visitors have nothing to upload.
            max_file_size=1,
        )
    if share and not page.share_url:
        page.close(verbose=False)
        raise UserError(
            "--share: Gradio's servers gave no public link: check the internet connection, or "
            "use --host to listen on an address of this machine"
        )
    return page, handlers


def main(argv: Sequence[str] | None = None) -> None:
    """Load the model and serve the page until it is interrupted."""
    from saint.page.latents import find_pages

    args = build_parser().parse_args(argv)
    log_arguments(
        argparse.Namespace(**vars(args) | {"auth": args.auth and "(given)"}), build_parser()
    )
    auth = choose_auth(args.auth, host=args.host, share=args.share)
    limits = Limits(args.max_prompts, new_tokens=args.max_new_tokens, tokens=args.max_total_tokens)
    require_port(args.host, args.port)  # before the model is loaded
    studio, guides = load_studio(args, limits)
    finder = open_finder(args, studio, guides)
    pages = find_pages(args.sae_model_path, guides)
    examples = load_showcase(args.sae_model_path[0].with_name(SHOWCASE), studio)
    if not examples and not any(guide.shown(1) for guide in guides):
        log.info("no examples are known to show: python -m saint.steering.showcase finds some")
    page, _ = launch(
        studio,
        guides,
        finder=finder,
        shown_concepts=examples,
        latent_pages=pages,
        host=args.host,
        port=args.port,
        share=args.share,
        auth=auth,
    )
    if auth is not None and args.auth is None:
        print(f"one-time login: user {auth[0]}, password {auth[1]}", flush=True)
    log.info("ctrl-C stops the page")
    print(f"open http://{args.host}:{args.port}", flush=True)
    if page.share_url:
        print(f"public link {page.share_url}", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


if __name__ == "__main__":
    run_stage(
        main,
        expected=(CheckpointError,),
        after_interrupt="the page is closed",
        when_full="load fewer SAEs, or use --dtype bfloat16",
        when_gpu_full=" or --device cpu",
    )
