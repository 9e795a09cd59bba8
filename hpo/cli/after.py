"""The command for a model that is trained: after."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hpo import text
from hpo.cli.app import CodeOption, JsonOption, app, quiet_optuna


@app.command()
def after(
    folder: Annotated[Path, typer.Argument(help="Folder that `hpo train` has written.")],
    recipes: Annotated[
        list[str] | None,
        typer.Argument(
            help="What to do with the model, each for itself: fold, prune=0.5, channels=0.25, bf16, fp16, int8, "
            "int8_weights, int8_static; one after the other with +: fold+prune=0.5."
        ),
    ] = None,
    mc_dropout: Annotated[
        int | None, typer.Option("--mc-dropout", min=2, max=100_000, help="Passes of Monte Carlo dropout.")
    ] = None,
    export: Annotated[
        list[str] | None,
        typer.Option("--export", help="Write the model and each recipe's as pt2 or onnx; may be repeated."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to write to; else FOLDER/after.")
    ] = None,
    json: JsonOption = False,
    code: CodeOption = None,
) -> None:
    """Shrink, quantise, examine and export a trained model; each variant is scored on the validation part."""
    from hpo.errors import SpecError, nearest
    from hpo.files import without_nan
    from hpo.final.after import files, report, steps, trained
    from hpo.view import variants

    wanted = [steps.read(text) for text in dict.fromkeys(recipes or [])]
    formats = list(dict.fromkeys(export or []))
    for one in formats:
        if one not in files.FORMATS:
            raise SpecError(f"--export {one}: there is no such format{nearest(one, files.FORMATS)}")
    steps.check(wanted)
    files.check(formats)
    quiet_optuna()
    target = output or folder / "after"
    made = report.make(trained.load(folder, code), wanted, target, passes=mc_dropout, formats=formats)
    if json:
        text.say_json(without_nan(made.to_json()))
    else:
        text.say_page(variants.report_text(made))
    for why in made.refused:
        text.say(f"error: {why}", to=sys.stderr)
    if not json:
        text.say(f"in {target}: {', '.join(sorted(path.name for path in target.iterdir()))}")
    raise typer.Exit(int(bool(made.refused)))
