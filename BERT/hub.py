"""Published networks and their tokenisers: from a folder, or by name from the Hugging Face hub."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers


def loaded(name: str, load: Callable[..., Any], **options: Any) -> Any:
    """What ``load`` makes of a folder, or of a name on the hub, without a word on stderr.

    Raises:
        ValueError: it is not there, or damaged.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return load(name, **options)
    except Exception as error:  # of files, networks and formats, in a dozen types
        reason = str(error).strip().partition("\n")[0]
        if Path(name).is_dir():
            raise ValueError(f"cannot load {name}: {reason}") from error
        raise ValueError(
            f"{name} is no folder and cannot be fetched from the Hugging Face hub; fetch it "
            f"elsewhere and name its folder ({reason})"
        ) from error
