"""Functions of a user's own file, named as ``path/to/file.py:function``."""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def check_function(spec: str, what: str) -> None:
    """Raises ValueError unless the file exists. ``what``: a word for messages, such as reward."""
    file = spec.rpartition(":")[0]
    if not Path(file).is_file():
        raise ValueError(f"{what} file {file!r} does not exist: give path/to/file.py:function")


def import_function(spec: str, what: str, *arguments: str) -> Callable[..., Any]:
    """The function.

    Args:
        what: a word for messages. arguments: names of what it is called with, in order.

    Raises:
        ValueError: no such file or function, the file fails on import, or the function takes other arguments.
    """
    check_function(spec, what)
    file, _, name = spec.rpartition(":")
    path = Path(file)
    module_spec = importlib.util.spec_from_file_location(f"marval_{what}_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"{what} file {file!r} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickle look their module up
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_spec.name]
        raise ValueError(f"{what} file {file!r} fails on import: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if function is None:
        defined = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_")) or "none"
        raise ValueError(f"{what} file {file!r} has no function {name!r}: it has {defined}")
    if not callable(function):
        raise ValueError(f"{name!r} of {file!r} is {function!r:.50}, not a function: name a function")
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise ValueError(f"{what} {spec!r} is called as {name}({', '.join(arguments)}): {error}") from None
    except ValueError:  # a function in C may not say what it takes
        pass
    return function
