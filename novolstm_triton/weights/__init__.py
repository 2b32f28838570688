"""The weights of a layer as other libraries have them: PyTorch's (`torch`) and Keras's (`keras`, `keras_files`).

The layers' own `from_torch`, `from_keras` and so on are implemented here. What is here makes layers of a class that it
is given and imports none. `keras` needs NumPy, which is optional: it is imported where it is called.
"""

from collections.abc import Iterable, Mapping
from typing import Any


def check_fixed(options: Mapping[str, Any], fixed: Iterable[str], origin: str) -> None:
    """Raise TypeError if an option is one that a conversion takes from what it converts.

    Args:
        options: what was given.
        fixed: names that may not be.
        origin: where their values come from, for the message.
    """
    for name in fixed:
        if name in options:
            raise TypeError(f"{name}: expected no such option, because it is taken from {origin}")
