"""What a decoder's config says about its shape."""

from typing import Any

from adept_fx.errors import ConfigError


def layer_count(decoder: Any) -> int:
    """Number of layers, by the config.

    Raises:
        ConfigError: The config does not say.
    """
    count = getattr(decoder.config, "num_hidden_layers", None)
    if not isinstance(count, int):
        raise ConfigError(f"{type(decoder).__name__}'s config has no num_hidden_layers")
    return count


def hidden_size(decoder: Any) -> int:
    """Width of the residual stream, by the config.

    Raises:
        ConfigError: The config does not say.
    """
    size = getattr(decoder.config, "hidden_size", None)
    if not isinstance(size, int):
        raise ConfigError(f"{type(decoder).__name__}'s config has no hidden_size")
    return size
