"""Keys that a table format padded objects with: Arrow and Parquet give every object in a column the keys of all, null where it had none.

Tools then show parameters that belong to other tools, and the model would be trained on a prompt that no agent ever saw. Taken out is
what cannot have been there: null where JSON Schema allows none, and null arguments that a call's tool does not declare. How many keys
were taken out is told, so that nothing changes in silence.
"""

from __future__ import annotations

from typing import cast

_MAY_BE_NULL = {"default", "const", "example"}
"""Keywords of JSON Schema whose value may be null."""
_BY_NAME = {"properties", "$defs", "definitions", "patternProperties", "dependentSchemas"}
"""Keywords whose value is an object of schemas under names of the author's choice."""
_VERBATIM = {*_MAY_BE_NULL, "enum", "examples"}


def without_padding(schemas: tuple[dict[str, object], ...]) -> tuple[tuple[dict[str, object], ...], int]:
    """(tool schemas without padded keys, how many there were); schemas without such keys are given back as they are.

    Where others were padded, a null `default` is padding too if the type does not allow null.
    """
    cleaned, n_removed = _clean_all(schemas, drop_defaults=False)
    return _clean_all(schemas, drop_defaults=True) if n_removed else (cleaned, 0)


def without_padded_arguments(raw: object, tools: tuple[dict[str, object], ...]) -> tuple[object, int]:
    """(messages without padded arguments, how many there were), for calls whose arguments are an object and whose tool is known."""
    declared = {name: parameters for name, parameters in map(_declared, tools) if name}
    if not declared or not isinstance(raw, list):
        return raw, 0
    n_removed = 0
    messages: list[object] = []
    for message in raw:
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        if isinstance(calls, list):
            kept = [_clean_call(call, declared) for call in calls]
            n_removed += sum(n for _, n in kept)
            messages.append({**message, "tool_calls": [call for call, _ in kept]})
        else:
            messages.append(message)
    return (messages, n_removed) if n_removed else (raw, 0)


def _clean_all(schemas: tuple[dict[str, object], ...], *, drop_defaults: bool) -> tuple[tuple[dict[str, object], ...], int]:
    cleaned = [_clean(schema, drop_defaults=drop_defaults) for schema in schemas]
    return tuple(cast("dict[str, object]", schema) for schema, _ in cleaned), sum(n for _, n in cleaned)


def _clean(schema: object, *, drop_defaults: bool, is_by_name: bool = False) -> tuple[object, int]:
    if isinstance(schema, list):
        items = [_clean(item, drop_defaults=drop_defaults) for item in schema]
        return [item for item, _ in items], sum(n for _, n in items)
    if not isinstance(schema, dict):
        return schema, 0
    kept: dict[str, object] = {}
    n_removed = 0
    for key, value in schema.items():
        if value is None and (is_by_name or key not in _MAY_BE_NULL or (drop_defaults and key == "default" and _forbids_null(schema))):
            n_removed += 1
        elif not is_by_name and key in _VERBATIM:
            kept[key] = value
        else:
            kept[key], n = _clean(value, drop_defaults=drop_defaults, is_by_name=not is_by_name and key in _BY_NAME)
            n_removed += n
    return kept, n_removed


def _forbids_null(schema: dict[str, object]) -> bool:
    kind = schema.get("type")
    return isinstance(kind, str) and kind != "null"


def _declared(tool: dict[str, object]) -> tuple[str, set[str]]:
    function = tool.get("function")
    parameters = function.get("parameters") if isinstance(function, dict) else None
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not isinstance(properties, dict):
        return "", set()
    return function["name"], set(properties)


def _clean_call(call: object, declared: dict[str, set[str]]) -> tuple[object, int]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        return call, 0
    arguments, name = function.get("arguments"), function.get("name")
    if not isinstance(arguments, dict) or not isinstance(name, str) or name not in declared:
        return call, 0
    kept = {key: value for key, value in arguments.items() if value is not None or key in declared[name]}
    return {**call, "function": {**function, "arguments": kept}}, len(arguments) - len(kept)
