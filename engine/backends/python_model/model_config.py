"""``pb_utils.ModelConfig``: what ``auto_complete_config`` fills in (spec P-121, P-122)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import msgspec

_TENSOR_PROPERTIES = ("name", "data_type", "dims", "optional")


class ModelConfig:
    """A model configuration that a model may complete, never contradict."""

    def __init__(self, model_config: str | bytes | Mapping[str, Any]) -> None:
        """Take a configuration as JSON text or as a dict."""
        if isinstance(model_config, str | bytes):
            self._config = msgspec.json.decode(model_config, type=dict[str, Any])
        else:
            self._config = copy.deepcopy(dict(model_config))

    @property
    def _name(self) -> str:
        return str(self._config.get("name", ""))

    def as_dict(self) -> dict[str, Any]:
        """Return the configuration."""
        return self._config

    def set_max_batch_size(self, max_batch_size: int) -> None:
        """Set the largest batch.

        Raises:
            ValueError: the configuration asks for a larger one.
        """
        configured = int(self._config.get("max_batch_size", 0))
        if configured > max_batch_size:
            raise ValueError(
                f"configuration specified max_batch_size {configured}, but in auto-complete-config function for model "
                f"'{self._name}' specified max_batch_size {max_batch_size}"
            )
        self._config["max_batch_size"] = max_batch_size

    def set_dynamic_batching(self) -> None:
        """Have requests joined to batches.

        Raises:
            ValueError: the configuration names another scheduler.
        """
        for choice in ("sequence_batching", "ensemble_scheduling"):
            if choice in self._config:
                raise ValueError(
                    f"Configuration specified scheduling_choice as '{choice}', but auto-complete-config function for "
                    f"model '{self._name}' tries to set scheduling_choice as 'dynamic_batching'"
                )
        self._config.setdefault("dynamic_batching", {})

    def set_model_transaction_policy(self, transaction_policy_dict: Mapping[str, Any]) -> None:
        """Say whether the model is decoupled: ``{"decoupled": True}``.

        Raises:
            ValueError: another property, or the configuration says otherwise.
        """
        if set(transaction_policy_dict) - {"decoupled"}:
            raise ValueError(
                f"model transaction property in auto-complete-config function for model '{self._name}' contains "
                "property other than 'decoupled'."
            )
        if "decoupled" not in transaction_policy_dict:
            return
        policy = self._config.setdefault("model_transaction_policy", {})
        wanted = bool(transaction_policy_dict["decoupled"])
        if policy.get("decoupled", wanted) != wanted:
            raise ValueError(
                f"trying to change decoupled property in auto-complete-config for model '{self._name}', which is "
                f"already set to '{policy['decoupled']}'."
            )
        policy["decoupled"] = wanted

    def add_input(self, input: Mapping[str, Any]) -> None:  # Triton's name
        """Add an input: ``{"name": ..., "data_type": "TYPE_*", "dims": [...], "optional": bool}``.

        Raises:
            ValueError: a property is missing or unknown, or the configuration says otherwise.
        """
        self._add("input", input, _TENSOR_PROPERTIES)

    def add_output(self, output: Mapping[str, Any]) -> None:
        """Add an output: ``{"name": ..., "data_type": "TYPE_*", "dims": [...]}``.

        Raises:
            ValueError: a property is missing or unknown, or the configuration says otherwise.
        """
        self._add("output", output, _TENSOR_PROPERTIES[:3])

    def _add(self, kind: str, tensor: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
        where = f"in auto-complete-config function for model '{self._name}'"
        shown = f"{kind} '{tensor['name']}'" if "name" in tensor else kind
        if set(tensor) - set(allowed):
            names = ", ".join(f"'{name}'" for name in allowed[:-1]) + f" and '{allowed[-1]}'"
            raise ValueError(f"{shown} {where} contains property other than {names}.")
        for key in ("name", "data_type", "dims"):
            if key not in tensor:
                raise ValueError(f"{shown} {where} is missing '{key}' property.")
        tensors: list[dict[str, Any]] = self._config.setdefault(kind, [])
        for configured in tensors:
            if configured.get("name") == tensor["name"]:
                self._complete(kind, configured, tensor)
                return
        tensors.append({**tensor, "dims": list(tensor["dims"])})

    def _complete(self, kind: str, configured: dict[str, Any], tensor: Mapping[str, Any]) -> None:
        prefix = f"unable to load model '{self._name}', configuration expects"
        name = tensor["name"]
        if configured.get("data_type", "TYPE_INVALID") == "TYPE_INVALID":
            configured["data_type"] = tensor["data_type"]
        elif configured["data_type"] != tensor["data_type"]:
            raise ValueError(
                f"{prefix} datatype {configured['data_type']} for {kind} '{name}', model provides {tensor['data_type']}"
            )
        wanted = list(tensor["dims"])
        if not configured.get("dims"):
            configured["dims"] = wanted
        elif list(configured["dims"]) != wanted:
            raise self._contradiction(name, "dims", wanted, configured["dims"])
        if "optional" in tensor:
            is_optional = bool(tensor["optional"])
            if configured.get("optional", is_optional) != is_optional:
                raise self._contradiction(name, "optional", is_optional, configured["optional"])
            configured["optional"] = is_optional

    def _contradiction(self, name: str, what: str, wanted: object, configured: object) -> ValueError:
        return ValueError(
            f"model '{self._name}', tensor '{name}': the model expects {what} {wanted} but the model configuration "
            f"specifies {what} {configured}"
        )
