"""Reading of the command line: recipes, flags from keyword arguments and dataclasses, one-line errors."""

import contextlib
import difflib
import functools
import io
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the known word that is closest to a mistyped one."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def parse(function: Callable[..., None], verb: str, args: list[str]) -> None:
    """Call the function with its keyword arguments read from flags.

    Raises:
        ValueError: an unknown flag (names the nearest one), a missing one, a bad value; one line.
    """
    import tyro

    settings: dict[str, Any] = {"prog": f"marval {verb}", "config": (tyro.conf.FlagCreatePairsOff,)}

    @functools.wraps(function)
    def deferred(*positional: Any, **flags: Any) -> Callable[[], None]:
        return lambda: function(*positional, **flags)

    given = [word.split("=")[0].replace("_", "-") for word in args if word.startswith("--") and word != "--help"]
    if given:
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as usage:
            tyro.cli(deferred, args=["--help"], **settings)
        known = set(re.findall(r"--[a-z][\w.-]*", usage.getvalue()))
        for flag in given:
            if flag not in known:
                raise ValueError(f"unknown flag {flag}{nearest(flag, known)}; see marval {verb} --help")
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            call = tyro.cli(deferred, args=args, **settings)
    except SystemExit as stop:
        if not stop.code:
            raise
        text = re.sub("[╰╯│─]+|-{3,}", " ", message.getvalue().partition("\n")[2])  # without the box and its title
        text = re.sub(r"^Error parsing config[.\w]*: ", "", " ".join(text.split()))  # checks name what they check
        text = re.sub(r"^Error parsing (--\S+): invalid literal .*: ('.*?') Argument.*", r"\1 \2 is no integer", text)
        raise ValueError(f"{text.split(' For full helptext')[0]}; see marval {verb} --help") from None
    call()


def recipe(verb: str, recipes: dict[str, Callable[[], Any]], args: list[str]) -> tuple[str, Any, list[str]]:
    """The first word, the recipe that it names, and the flags that follow."""
    if args and args[0] in ("-h", "--help"):
        name = next(iter(recipes))
        return name, recipes[name](), args
    if not args or args[0].startswith("-"):
        raise ValueError(f"name a recipe first: marval {verb} {'|'.join(recipes)} --out DIR")
    if args[0] not in recipes:
        raise ValueError(f"unknown recipe {args[0]!r}{nearest(args[0], recipes)}: choose from {', '.join(recipes)}")
    return args[0], recipes[args[0]](), args[1:]


def flat(config: Any) -> Any:
    """Type of an argument whose fields are flags without a prefix."""
    import tyro

    return Annotated[type(config), tyro.conf.arg(name="")]


def positional() -> Any:
    """Marks an argument that has no flag."""
    import tyro

    return tyro.conf.Positional


def required() -> Any:
    """Says so in the help of an argument of several values, whose default is none."""
    import tyro

    return tyro.conf.arg(help_behavior_hint="(required)")
