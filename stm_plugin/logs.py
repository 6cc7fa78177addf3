"""The package's log lines, shown to users who have configured no logging."""

import logging


def show_log_lines() -> None:
    """Show INFO lines of this package, on stderr where no handler is set up; what a user configured stays."""
    logger = logging.getLogger(__package__)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[STM] %(message)s"))
        logger.addHandler(handler)
