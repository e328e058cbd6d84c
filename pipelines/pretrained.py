"""`run_folder`: the run folder that a path names; `pretrained` names the model that comes with metnet."""

import logging
from pathlib import Path

NAME = "pretrained"
FOLDER = Path(__file__).parents[1] / "metnet" / NAME
log = logging.getLogger(__name__)


def run_folder(path: str | Path) -> Path:
    """The folder at a path; of the text "pretrained" alone, the one inside the installation.

    A folder of yours with that name is `./pretrained`, or a `Path`.

    Raises:
        ValueError: if the installation holds no model.
    """
    if path != NAME:
        return Path(path)
    if Path(NAME).exists():
        log.warning(
            "%s is the model that comes with metnet; for what is called so here, say ./%s", NAME, NAME
        )
    if not FOLDER.is_dir():
        raise ValueError(
            f"{NAME}: no pretrained model in this installation, which would be in {FOLDER}; expected an "
            "installation from a release, or train one: metnet train experiment=pretrained cube.data=FOLDER "
            "run=RUN_DIR, and say model=RUN_DIR"
        )
    return FOLDER
