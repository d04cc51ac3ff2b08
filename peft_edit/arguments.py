"""Checks of arguments that both methods share."""


def check_choice(name: str, value: object, choices: tuple) -> None:
    """Raise ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
