"""Hide what the libraries say about their own workings; what concerns the user is checked and said by us."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence lm-eval's notes, transformers' bars and the warnings of known versions, until the block ends."""
    import transformers

    # lm-eval: an advertisement for --metadata with every custom data set, and notes on changed generation settings.
    # bitsandbytes: that an optional kernel is not installed.
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "bitsandbytes")]
    levels = [logger.level for logger in loggers]
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()  # one for the base's files; ours shows the problems
        with warnings.catch_warnings():
            # peft 0.21.2 reads an attribute that transformers 5.23 has renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            # The backend's check of the adapter says it, and stops.
            warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
