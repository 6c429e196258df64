"""JSON as every program writes and reads it here: what the standard knows, on one line."""

import json
import math


def to_json(value, **options):
    """Return the value as JSON text: infinity becomes the string "inf", which from_json() turns back, and nan becomes null.

    Args:
        options: of json.dumps.
    """
    return json.dumps(_with_words(value), allow_nan=False, **options)


def from_json(text):
    """Return what to_json() made the text of; files of old with Infinity in them can be read, too.

    Raises:
        ValueError: the text is no JSON, or its nesting is too deep.
    """
    return _with_numbers(parse_json(text))


def json_object(text):
    """Return the dict that a JSON text of another program is.

    Raises:
        ValueError: the text is no JSON object, or its nesting is too deep.
    """
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is expected, not {type(value).__name__}")
    return value


def parse_json(text):
    """Return what a JSON text says, as json.loads does; a nesting that is too deep is a ValueError, too."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its lists or objects are nested too deep") from error


def _with_words(value):
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, dict):
        return {key: _with_words(item) for key, item in value.items()}
    return [_with_words(item) for item in value] if isinstance(value, (list, tuple)) else value


def _with_numbers(value):
    if isinstance(value, str) and value in ("inf", "-inf"):
        return float(value)
    if isinstance(value, dict):
        return {key: _with_numbers(item) for key, item in value.items()}
    return [_with_numbers(item) for item in value] if isinstance(value, list) else value
