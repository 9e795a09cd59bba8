"""Types of texts in a study file that must have a form, with a message that names the form."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError


def matching(pattern: str, form: str) -> AfterValidator:
    """Return a validator for texts of a form.

    Args:
        pattern: a pattern that fits the whole text.
        form: the form in words, for the message "input should be ...".
    """

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise PydanticCustomError("form", "Input should be {form}", {"form": form})
        return text

    return AfterValidator(check)


Folder = Annotated[str, matching(r"/.*[^/]", 'an absolute path, such as "/data"')]
Image = Annotated[str, matching(r"\S+", 'the name of an image, such as "registry.example.com/hpo:1"')]
