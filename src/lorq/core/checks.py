"""Checks of settings."""


def check_grid(bits: int, group_size: int) -> None:
    """Refuse widths and group sizes that no grid has.

    Raises:
        ValueError: naming the setting, its range and the value.
    """
    if bits not in range(2, 9):
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    if group_size < 1 and group_size != -1:
        raise ValueError(f"group_size must be at least 1, or -1 for one group per row, got {group_size}")


def check_choice(name: str, value: str, known: object) -> None:
    """Refuse a name that is not in a table, and list those that are.

    Raises:
        ValueError: naming the setting, the value and the known names.
    """
    names = list(known)  # type: ignore[call-overload]
    if value not in names:
        raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}")


def check_range(name: str, value: float | int, low: float | int, high: float | int) -> None:
    """Refuse a number outside ``low .. high``.

    Raises:
        ValueError: naming the setting, its range and the value.
    """
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, got {value}")
