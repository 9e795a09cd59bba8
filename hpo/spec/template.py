"""The commented study file that `hpo init` writes."""

from __future__ import annotations

import json
import re
from importlib import resources

from hpo.errors import SpecError, nearest

#: data -> what takes the place of the template's lines before `split_seed`
SECTIONS = {
    "image_folder": """\
name = "image_folder"
root = "photos"              # beside this file; each folder is a class: photos/cat/1.jpg, photos/dog/2.png, ...
size = 64                    # height and width to which the images are scaled
# labels = "labels.csv"      # a table of file names and labels, if the folders are no classes
""",
    "csv": """\
name = "csv"
images = "images.csv"        # beside this file; one image a row, whole numbers from 0 to 255
labels = "labels.csv"        # one label a row, numbers or names
shape = [28, 28]             # of an image: [H, W] or [C, H, W]
header = true                # the first row of both tables names the columns
""",
    "npz": """\
name = "npz"
path = "images.npz"          # beside this file; arrays images and labels, or x_train, y_train, x_val, y_val, ...
""",
}
PLACEHOLDER = '"my-study"'  # for the study's name
DATA = re.compile(r"(?<=^\[data\]\n).*?(?=^split_seed)", re.MULTILINE | re.DOTALL)


def text(name: str, data: str | None = None) -> str:
    """Return the study file for a study of this name.

    Args:
        name: the study's name.
        data: the kind of the user's own data; without it the built-in digits.
    """
    found = resources.files("hpo.spec").joinpath("template.toml").read_text()
    found = found.replace(PLACEHOLDER, json.dumps(name).ljust(len(PLACEHOLDER)))
    if data is None:
        return found
    if data not in SECTIONS:
        raise SpecError(f"--data {data}: there is no such kind{nearest(data, SECTIONS)}")
    return DATA.sub(lambda _: SECTIONS[data], found)
