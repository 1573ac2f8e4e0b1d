"""Talk to a registered model, or to one that is served: text goes on as it is made.

python experiments/chat.py                                  the champion of the registry, in this process
python experiments/chat.py --model models:/lm/2 --temperature 0.5
python experiments/chat.py --url http://127.0.0.1:5001      a served model; its answers come whole

A line is continued. /next shows the likeliest next tokens after the text so far, /set temperature=0.2 changes a
parameter, an empty line lets the text so far go on, /quit ends.
"""

from __future__ import annotations

import http.client
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from experiments import cli
from lm.errors import UserError

if TYPE_CHECKING:
    from lm.service import Service

_DEFAULTS = {
    "max_new_tokens": 20,
    "temperature": 0.8,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


class _Speaker(Protocol):
    def stream(self, text: str, params: dict[str, Any]) -> Iterator[str]: ...


class _Remote:
    """A served model: one request a line."""

    def __init__(self, url: str) -> None:
        self._url = f"{url.rstrip('/')}/invocations"

    def stream(self, text: str, params: dict[str, Any]) -> Iterator[str]:
        """The whole continuation at once, with the prompt as the model reads it."""
        body = json.dumps({"inputs": [text], "params": {**params, "return": "full"}}).encode()
        try:
            request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=90) as answer:
                [made] = json.load(answer)["predictions"]
            text, prompt = made["text"], made["prompt"]
        except urllib.error.HTTPError as e:
            said = e.read().decode(errors="replace")
            try:
                said = json.loads(said)["message"]
            except (ValueError, KeyError, TypeError):
                said = said[:200]
            raise UserError(said) from e
        except OSError as e:
            raise UserError(f"the served model must be reachable: got {e} at {self._url}. Try another --url.") from e
        except (ValueError, KeyError, TypeError, http.client.HTTPException) as e:
            raise UserError(
                f"the address must be of a model served by this project: got {e}. Try another --url."
            ) from e
        yield text[len(prompt) :]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, read lines until the end of the input, continue each."""
    parser = cli.Parser(__doc__ or "")
    parser.add_argument("--model", default="models:/lm@champion", help="a registered model (default: the champion)")
    parser.add_argument("--url", help="address of a served model, in place of --model")
    parser.add_argument(
        "--seed", type=int, default=-1, help="equal seeds give equal text (default: a new one each time)"
    )
    for name, default in _DEFAULTS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help=f"(default: {default})")
    args = parser.parse(argv)
    params: dict[str, Any] = {name: getattr(args, name) for name in (*_DEFAULTS, "seed")}
    speaker: _Speaker
    service: Service | None = None
    if args.url:
        speaker = _Remote(args.url)
    else:
        from experiments import export
        from experiments.settings import Settings
        from experiments.tracking import Tracker

        Tracker(Settings.load())  # points MLflow to the store
        speaker = service = export.load_service(args.model)
    text = ""
    print("A line is continued; /next, /set NAME=VALUE, /quit.", flush=True)
    for line in _lines():
        try:
            if line == "/quit":
                return
            if line == "/next":
                _show_candidates(service, text)
            elif line.startswith("/set "):
                name, _, value = line.removeprefix("/set ").partition("=")
                params[name.strip()] = _number(name.strip(), value.strip(), params)
            elif line.startswith("/"):
                raise UserError(f"a command must be /next, /set or /quit: got {line[:40]}. Try /next.")
            else:
                text = line or text
                print(text, end="", flush=True)
                for piece in speaker.stream(text, params):
                    text += piece
                    print(piece, end="", flush=True)
                print(flush=True)
        except UserError as e:
            print(f"\n{e}", flush=True)


def _lines() -> Iterator[str]:
    """What a person types, or a file holds, line by line."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()


def _number(name: str, value: str, params: dict[str, Any]) -> int | float:
    if name not in params:
        raise UserError(f"a parameter must be one of {', '.join(params)}: got {name[:40]}. Try temperature.")
    try:
        return type(params[name])(value)
    except ValueError as e:
        raise UserError(f"{name} must be a number: got {value[:40]}. Try {name}={params[name]}.") from e


def _show_candidates(service: Service | None, text: str) -> None:
    if service is None:
        raise UserError("candidates need the model in this process: got --url. Try --model.")
    for token, probability in service.candidates(text):
        print(f"{probability:7.2%}  {token}")


if __name__ == "__main__":
    cli.run(main)
