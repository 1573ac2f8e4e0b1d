"""The model as `mlflow models serve` runs it: text in, text out. Of this project it imports `lm` alone.

MLflow stores this file beside the checkpoint and a copy of `lm`, and runs it; nothing is pickled.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import mlflow.models
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from lm import checkpoint, generate, runtime
from lm.errors import UserError

PARAMS: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": -1}
"""Sampling parameters and their defaults; a seed of -1 draws a new one for each call."""

LIMITS = {"inputs": 64, "characters": 10_000, "max_new_tokens": 1_000, "new_tokens_in_all": 2_000}
"""Sizes of one request; there is no deadline yet, so a large model on a slow machine may meet the server's 60 s."""


class ServedModel(PythonModel):
    """Continues each prompt."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the checkpoint, checking every file's digest."""
        loaded = checkpoint.load(Path(context.artifacts["checkpoint"]))
        model = loaded.state.model
        precision = runtime.resolve_precision(loaded.config.train.precision, model.device)
        self.model, self.vocab = generate.for_generation(model, precision), loaded.vocab

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]  # MLflow's base returns nothing
        self, context: PythonModelContext, model_input: list[str], params: dict[str, Any] | None = None
    ) -> list[str]:
        """The prompts, each continued by up to `max_new_tokens` tokens.

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE (HTTP 400) with rule, value and remedy.
        """
        values = {**PARAMS, **(params or {})}
        try:
            unknown = sorted(set(values) - set(PARAMS))
            _require(not unknown, "params", f"be among {', '.join(PARAMS)}", unknown)
            _require(
                len(model_input) <= LIMITS["inputs"],
                "inputs",
                f"be at most {LIMITS['inputs']}",
                len(model_input),
            )
            for text in model_input:
                _require(
                    len(text) <= LIMITS["characters"],
                    "an input",
                    f"have at most {LIMITS['characters']} characters",
                    len(text),
                )
            new = values["max_new_tokens"]
            _require(
                1 <= new <= LIMITS["max_new_tokens"],
                "max_new_tokens",
                f"be from 1 to {LIMITS['max_new_tokens']}",
                new,
            )
            total, most = new * len(model_input), LIMITS["new_tokens_in_all"]
            _require(total <= most, "max_new_tokens times inputs", f"be at most {most}", total)
            seed = None if values["seed"] == -1 else int(values["seed"])
            sampling = {name: values[name] for name in ("temperature", "top_k", "top_p")}
            return generate.generate_texts(self.model, self.vocab, model_input, max_length=new, seed=seed, **sampling)
        except UserError as e:
            raise MlflowException(str(e), error_code=INVALID_PARAMETER_VALUE) from e
        except Exception as e:  # what is ours to mend stays in the log
            logging.getLogger(__name__).exception("prediction failed")
            raise MlflowException("the model failed; the server's log says why", error_code=INTERNAL_ERROR) from e


def _require(holds: bool, name: str, rule: str, got: object) -> None:
    if not holds:
        raise UserError(f"{name} must {rule}: got {got}.")


mlflow.models.set_model(ServedModel())
