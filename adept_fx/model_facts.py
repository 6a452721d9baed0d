"""What a decoder's config says about its shape."""

from typing import Any

from adept_fx.errors import ConfigError


def layer_count(decoder: Any) -> int:
    """Number of layers, by the config.

    Raises:
        ConfigError: The config does not say.
    """
    return _whole_number(decoder, "num_hidden_layers")


def hidden_size(decoder: Any) -> int:
    """Width of the residual stream, by the config.

    Raises:
        ConfigError: The config does not say.
    """
    return _whole_number(decoder, "hidden_size")


def _whole_number(decoder: Any, name: str) -> int:
    value = getattr(decoder.config, name, None)
    if not isinstance(value, int):
        raise ConfigError(f"{type(decoder).__name__}'s config has no {name}")
    return value
