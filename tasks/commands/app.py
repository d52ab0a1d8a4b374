"""``lightning app``: a page on this machine, to drop pictures on and type words."""

from __future__ import annotations

import sys
import tempfile
import threading
import warnings
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path

from common import signals
from tasks.commands._parser import Parser


def arguments() -> Parser:
    """Of ``lightning app``."""
    parser = Parser(
        prog="lightning app",
        description="Serve a page: drop a picture, type words, and see where CLIP sees them, by several "
        "methods side by side; points, SAM's masks, ranked captions, and CLIP's own words. It starts "
        "with the demo's CLIP, offline, and only this machine can reach it.",
    )
    parser.add_argument(
        "--model",
        nargs="+",
        action="append",
        metavar=("NAME", "WEIGHTS"),
        help="what the page starts with, such as --model ViT-B-16 openai (demo); given again, what it "
        "offers beside. Names are those of `lightning list models`, weights a tag or a file",
    )
    parser.add_argument(
        "--sam", metavar="NAME", help="masks by SAM: its name on the Hugging Face hub, or a folder"
    )
    parser.add_argument("--device", default="cpu", help="where it is computed, such as cuda (cpu)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="the address to listen on (127.0.0.1: only this machine). There is no password: who reaches "
        "another one can use the page, with the models named here",
    )
    parser.add_argument("--port", type=int, help="its port (the first free one from 7860 on)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    return parser


def main(argv: list[str]) -> int:
    """Run ``lightning app`` until a signal stops it; returns the exit code."""
    parser = arguments()
    options = parser.parse_args(argv)
    models = options.model or [["demo"]]
    if any(len(words) > 2 for words in models):
        parser.error("--model takes a name and its weights, and is given again for another")
    for name in ("gradio", "matplotlib"):
        if find_spec(name) is None:
            print(
                f"lightning app: needs {name}: pip install 'clip-surgery-lightning[app]'",
                file=sys.stderr,
            )
            return 1
    from tasks.app.answers import Answers

    local = _is_local(options.host)
    answers = Answers(
        [" ".join(words) for words in models],
        sam=options.sam,
        device=options.device,
        any_model=local,
    )
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="lightning-app-") as folder:
        warnings.simplefilter("ignore", DeprecationWarning)  # of gradio's own dependencies
        from tasks.app.page import serve

        blocks, address = serve(
            answers,
            host=options.host,
            port=options.port,
            folder=Path(folder),
            browse=options.open,
        )
        print(f"lightning app: {answers.models[0]} on {options.device}, at {address}")
        if not local:
            print("Without a password: whoever reaches this address can use it.")
        print("Ctrl-C ends it.", flush=True)
        try:
            with signals.interruptible():
                threading.Event().wait()
        except signals.Stopped as stop:
            print(f"lightning app: {stop}", file=sys.stderr)
            return stop.code
        finally:
            blocks.close(verbose=False)
    return 0


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
