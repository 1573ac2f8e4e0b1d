"""The model as `mlflow models serve` runs it: text in, text out. Of this project it imports `lm` alone.

MLflow stores this file beside the checkpoint and a copy of `lm`, and runs it; nothing is pickled. In MLflow's server it
also stands at the door (`_Door`): what the server would answer with a stack trace, let wait without end, or overlook,
is refused here in one line.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow.models
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    DEADLINE_EXCEEDED,
    INTERNAL_ERROR,
    INVALID_PARAMETER_VALUE,
    RESOURCE_EXHAUSTED,
)
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from lm import checkpoint, generate, runtime, service
from lm.errors import UserError
from lm.service import DeadlineError, Service

_FORMS = ("inputs", "instances", "dataframe_split", "dataframe_records")
_SERVER = "mlflow.pyfunc.scoring_server"


class Refusal(MlflowException):
    """An error as the caller shall see it: one line, and the code that MLflow makes an HTTP status of."""

    def __init__(self, line: str, code: int, status: int) -> None:
        super().__init__(line, error_code=code)
        self.line, self.status = line, status

    def body(self) -> str:
        """As JSON, in MLflow's own form."""
        return json.dumps({"error_code": self.error_code, "message": self.line})


class ServedModel(PythonModel):
    """Continues each prompt."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the checkpoint, checking every file's digest, and stand at the door if a server is loading this."""
        for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(cache, "128")  # by default oneDNN keeps code for 1,024 shapes of batches
        loaded = checkpoint.load(Path(context.artifacts["checkpoint"]))
        model = loaded.state.model
        precision = runtime.resolve_precision(loaded.config.train.precision, model.device)
        limits = service.limits_of(os.environ)
        self.service = Service(generate.for_generation(model, precision), loaded.vocab, limits)
        server = sys.modules.get(_SERVER)
        if server is not None and hasattr(server, "invocations") and hasattr(server, "asyncio"):
            server.asyncio = _Door(server, self.service)  # pyright: ignore[reportAttributeAccessIssue]

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]  # MLflow's base returns nothing
        self, context: PythonModelContext, model_input: list[str], params: dict[str, Any] | None = None
    ) -> list[str]:
        """The prompts, each continued by up to `max_new_tokens` tokens; `lm.service` says what else params may ask.

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE (HTTP 400) with rule, value and remedy; DEADLINE_EXCEEDED (504);
                INTERNAL_ERROR (500) with an id that stands in the log.
        """
        params = params or {}
        with _Told():
            answers = self.service.answer(model_input, params)
        if params.get("return") == "full":
            return [answer.full() for answer in answers]  # pyright: ignore[reportReturnType]  # MLflow knows one type alone
        return [answer.text for answer in answers]

    def predict_stream(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, context: PythonModelContext, model_input: list[str], params: dict[str, Any] | None = None
    ) -> Iterator[str]:
        """The pieces of one prompt's continuation, as they come.

        Raises:
            MlflowException: as `predict`.
        """
        with _Told():
            texts = [model_input] if isinstance(model_input, str) else list(model_input)  # MLflow hands one over alone
            if len(texts) != 1:
                raise UserError(f"a stream must have one input: got {len(texts)}. Try predict.")
            yield from self.service.stream(texts[0], params or {})


class _Told:
    """Turns errors within it into refusals; what is ours to mend goes to the log under an id."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UserError):
            raise Refusal(str(error), INVALID_PARAMETER_VALUE, 400) from error
        if isinstance(error, DeadlineError):
            raise Refusal(str(error), DEADLINE_EXCEEDED, 504) from error
        if isinstance(error, Exception) and not isinstance(error, Refusal):
            raise _ours(error) from error


def _ours(error: Exception) -> Refusal:
    name = secrets.token_hex(4)
    logging.getLogger(__name__).error("error %s\n%s", name, "".join(traceback.format_exception(error)))
    return Refusal(f"the model failed; the server's log says why under {name}", INTERNAL_ERROR, 500)


class _Door:
    """Stands in MLflow's server where it hands a request to a thread: `asyncio.to_thread`, the one name it replaces.

    There requests can be refused before one of the server's few threads is taken.
    """

    def __init__(self, server: Any, served: Service) -> None:
        self._server, self._served, self._limits = server, served, served.limits
        self._threads = ThreadPoolExecutor(served.limits.waiting, thread_name_prefix="request")
        self._inside = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def to_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Answer a request, or refuse it; anything else than a request is passed on."""
        if function is not self._server.invocations:
            return await asyncio.to_thread(function, *arguments)
        began, said = time.monotonic(), {"bytes": len(arguments[0])}
        if self._inside >= self._limits.waiting:
            line = f"at most {self._limits.waiting} requests may wait: got one more. Try again in a second."
            return self._answer(Refusal(line, RESOURCE_EXHAUSTED, 429), began, said)
        self._inside += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, self._serve, arguments, began, said)
        finally:
            self._inside -= 1

    def _serve(self, arguments: Sequence[Any], began: float, said: dict[str, Any]) -> Any:
        data, content_type, model, schema = arguments
        try:
            data = self._checked(data, content_type or "", said)
            answer = self._server.invocations(data, content_type, model, schema)
            if answer.status >= 400:  # what else the server does not like of the content type
                line = "a request must be application/json in UTF-8: got another content type. Try that."
                return self._answer(Refusal(line, INVALID_PARAMETER_VALUE, answer.status), began, said)
        except Refusal as e:
            return self._answer(e, began, said)
        except UserError as e:
            return self._answer(Refusal(str(e), INVALID_PARAMETER_VALUE, 400), began, said)
        except Exception as e:
            return self._answer(_ours(e), began, said)
        self._log(answer.status, began, said)
        return answer

    def _checked(self, data: bytes, content_type: str, said: dict[str, Any]) -> bytes:
        """Refuse what MLflow would let pass, or answer with a stack trace; any JSON form becomes that of inputs."""
        most = self._limits.body_bytes
        if len(data) > most:
            line = f"a request must have at most {most:,} bytes: got {len(data):,}. Try several."
            raise Refusal(line, INVALID_PARAMETER_VALUE, 413)
        kind = content_type.split(";")[0].strip()
        if kind != "application/json":
            line = (
                f"a request must be application/json: got {ascii(kind)[:100]}. Try -H 'Content-Type: application/json'."
            )
            raise Refusal(line, INVALID_PARAMETER_VALUE, 415)
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as e:
            raise UserError(f"a request must be JSON in UTF-8: got {str(e)[:100]}. Try a JSON library.") from e
        if not isinstance(body, dict) or sum(form in body for form in _FORMS) != 1:
            raise UserError(f"a request must be an object with one of {', '.join(_FORMS)}: got another. Try inputs.")
        unknown = sorted(set(body) - {*_FORMS, "params"})
        if unknown:
            raise UserError(f"a request must hold inputs and params alone: got {ascii(unknown[0])[:100]}. Try params.")
        params = body.get("params", {})
        if not isinstance(params, Mapping):
            raise UserError(f"params must be an object: got {type(params).__name__}. Try {{}}.")
        inputs = _texts(body)
        said["inputs"] = len(inputs)
        values = self._served.check(inputs, params)  # MLflow drops params that it does not know
        return json.dumps({"inputs": inputs, "params": values}).encode()

    def _answer(self, refusal: Refusal, began: float, said: Mapping[str, Any]) -> Any:
        self._log(refusal.status, began, said)
        return self._server.InvocationsResponse(refusal.body(), refusal.status, "application/json")

    def _log(self, status: int, began: float, said: Mapping[str, Any]) -> None:
        """One JSON line a request, without its text."""
        taken = round(1e3 * (time.monotonic() - began), 1)
        line = {"time": round(time.time(), 3), "status": status, "milliseconds": taken, **said}
        print(json.dumps(line), file=sys.stderr, flush=True)


def _texts(body: Mapping[str, Any]) -> list[Any]:
    """The inputs of a request: a list, or the one column of a table."""
    if "dataframe_split" in body:
        table = body["dataframe_split"]
        rows = table.get("data") if isinstance(table, dict) else None
    elif "dataframe_records" in body:
        records = body["dataframe_records"]
        is_table = isinstance(records, list) and all(isinstance(record, dict) for record in records)
        rows = [list(record.values()) for record in records] if is_table else None
    else:
        texts = body.get("inputs", body.get("instances"))
        rows = [[text] for text in texts] if isinstance(texts, list) else None
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 1 for row in rows):
        raise UserError('inputs must be a list of texts, or a table of one column: got another. Try ["what is the"].')
    return [row[0] for row in rows]


mlflow.models.set_model(ServedModel())
