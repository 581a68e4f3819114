"""Single files of the Hugging Face hub, through transformers, and silence around it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no reports on stderr: what is wrong with a file is raised instead."""
    log = transformers.utils.logging
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()


def hub_file(source: str, file: str) -> Path:
    """A file of OWNER/NAME, fetched, or found in the cache.

    Raises:
        ValueError: transformers is not installed, or the hub does not give the file.
    """
    try:
        import transformers
    except ImportError:
        raise ValueError("it needs transformers: pip install 'marval[rewards]'") from None
    with quiet(transformers):
        try:
            return Path(str(transformers.utils.hub.cached_file(source, file)))
        except OSError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"there is no folder {source}, and the hub gives no {file}: {reason}") from None
